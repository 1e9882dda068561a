fn main() -> std::process::ExitCode {
    hae::cli::main()
}
