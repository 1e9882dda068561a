//! llama.cpp as its crate comes, without this project's patches and code, timed as `hae bench` times
//! `full`: one line of JSON with the milliseconds of a prompt and of a token after it.

use std::error::Error;
use std::ffi::CString;
use std::time::Instant;

use clap::Parser;
use llama_cpp_sys_2 as sys;

#[derive(Parser)]
struct Args {
    /// Text model (GGUF)
    #[arg(short)]
    model: String,
    /// Tokens of the prompt
    #[arg(short = 'p', default_value_t = 512)]
    n_prompt: usize,
    /// Tokens decoded after it
    #[arg(short = 'n', default_value_t = 16)]
    n_gen: usize,
    /// Tokens in the cache before
    #[arg(short = 'd', default_value_t = 0)]
    n_depth: usize,
    #[arg(short = 't', default_value_t = 2)]
    n_threads: i32,
    #[arg(short = 's', default_value_t = 1)]
    seed: u64,
}

const N_UBATCH: usize = 512;

/// A context that lives as long as the program.
struct Context {
    raw: *mut sys::llama_context,
    n_vocab: u64,
    state: u64,
    pos: i32,
}

impl Context {
    fn new(args: &Args) -> Result<Self, Box<dyn Error>> {
        let path = CString::new(args.model.as_str())?;
        let cells = args.n_depth + args.n_prompt + args.n_gen;
        extern "C" fn quiet(
            _: sys::ggml_log_level,
            _: *const std::ffi::c_char,
            _: *mut std::ffi::c_void,
        ) {
        }
        // SAFETY: plain calls with default parameters; the path lives during the call, what comes
        // back is checked, and both model and context live to the end of the program.
        let (raw, n_vocab) = unsafe {
            sys::llama_log_set(Some(quiet), std::ptr::null_mut());
            sys::llama_backend_init();
            let model =
                sys::llama_model_load_from_file(path.as_ptr(), sys::llama_model_default_params());
            if model.is_null() {
                return Err(format!("{}: cannot be loaded", args.model).into());
            }
            let mut params = sys::llama_context_default_params();
            params.n_ctx = u32::try_from(cells)?.next_multiple_of(256);
            params.n_batch = params.n_ctx.min(2048);
            params.n_ubatch = params.n_ctx.min(N_UBATCH as u32);
            params.n_threads = args.n_threads;
            params.n_threads_batch = args.n_threads;
            let raw = sys::llama_init_from_model(model, params);
            if raw.is_null() {
                return Err(format!("no context of {} cells", params.n_ctx).into());
            }
            (raw, sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model)))
        };
        Ok(Context {
            raw,
            n_vocab: u64::try_from(n_vocab)?,
            state: args.seed,
            pos: 0,
        })
    }

    fn token(&mut self) -> i32 {
        // Knuth's MMIX generator: any reproducible tokens will do.
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % self.n_vocab) as i32
    }

    /// Takes `n` random tokens in, a micro-batch a call as `hae` does, and waits for the logits.
    fn feed(&mut self, n: usize) -> Result<(), Box<dyn Error>> {
        let mut left = n;
        while left > 0 {
            let rows = left.min(N_UBATCH);
            left -= rows;
            let mut tokens: Vec<i32> = (0..rows).map(|_| self.token()).collect();
            let mut pos: Vec<i32> = (self.pos..).take(rows).collect();
            self.pos += rows as i32;
            let mut seq = 0;
            let mut seq_id = vec![&raw mut seq; rows];
            let mut n_seq_id = vec![1; rows];
            let mut logits = vec![0; rows];
            logits[rows - 1] = i8::from(left == 0);
            let batch = sys::llama_batch {
                n_tokens: rows as i32,
                token: tokens.as_mut_ptr(),
                embd: std::ptr::null_mut(),
                pos: pos.as_mut_ptr(),
                n_seq_id: n_seq_id.as_mut_ptr(),
                seq_id: seq_id.as_mut_ptr(),
                logits: logits.as_mut_ptr(),
            };
            // SAFETY: every array has `rows` elements and outlives the call.
            let status = unsafe { sys::llama_decode(self.raw, batch) };
            if status != 0 {
                return Err(format!("llama_decode: status {status}").into());
            }
        }
        // SAFETY: the last row asked for logits.
        let logits = unsafe { sys::llama_get_logits_ith(self.raw, -1) };
        if logits.is_null() {
            return Err("no logits".into());
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.pos = 0;
        // SAFETY: the context is alive.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.raw), true) };
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let mut context = Context::new(&args)?;
    // The first decode of a context makes its graphs.
    context.feed(1)?;
    context.clear();
    let before = match (args.n_depth, args.n_prompt) {
        (0, 0) => 1,
        (depth, _) => depth,
    };
    if before > 0 {
        context.feed(before)?;
    }
    let start = Instant::now();
    if args.n_prompt > 0 {
        context.feed(args.n_prompt)?;
    }
    let prefill = start.elapsed();
    let start = Instant::now();
    for _ in 0..args.n_gen {
        context.feed(1)?;
    }
    let tpot = start.elapsed() / u32::try_from(args.n_gen.max(1))?;
    println!(
        "{{\"prefill_ms_median\":{},\"tpot_ms_median\":{}}}",
        prefill.as_secs_f64() * 1e3,
        tpot.as_secs_f64() * 1e3
    );
    Ok(())
}
