//! What Metal would do, without a Mac (`tests/dry-metal`).

#[test]
fn the_pinned_backend_compiles_without_apple() {
    assert_eq!(dry_metal::BROKEN, "");
}
