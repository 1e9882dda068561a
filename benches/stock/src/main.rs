//! llama.cpp as its crate comes, without this project's patches and code, timed as `hae bench` times
//! `full`: one line of JSON, with the fields that `hae bench -o jsonl` has.

use std::error::Error;
use std::ffi::CString;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use llama_cpp_sys_2 as sys;

/// The flags of `hae bench` that it knows mean the same here. No lists.
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
    /// -pg: both, in one test
    #[arg(long, value_name = "PP,TG", value_delimiter = ',')]
    pg: Vec<usize>,
    /// Tokens in the cache before
    #[arg(short = 'd', default_value_t = 0)]
    n_depth: usize,
    /// Let all but 64 tokens of the depth be copies of the K and V of these
    #[arg(long)]
    depth_copies: bool,
    /// Pictures in front of the prompt
    #[arg(long, default_value_t = 0)]
    images: usize,
    /// Made-up embeddings for each picture
    #[arg(long, default_value_t = 0)]
    image_tokens: usize,
    /// -fa: flash attention
    #[arg(long, value_enum, default_value_t = Flash::Auto)]
    fa: Flash,
    /// -ctk: type of K
    #[arg(long, default_value = "f16")]
    ctk: String,
    /// -ctv: type of V
    #[arg(long, default_value = "f16")]
    ctv: String,
    #[arg(short = 't', default_value_t = 2)]
    n_threads: i32,
    #[arg(short = 's', default_value_t = 1)]
    seed: u64,
    /// Let the model run once before anything is timed, as on a GPU that loads its kernels
    #[arg(long)]
    warmup: bool,
}

impl Args {
    /// Tokens in the cache before anything is timed: without a prompt at least one.
    fn before(&self) -> usize {
        match (self.n_depth, self.n_prompt) {
            (0, 0) => 1,
            (depth, _) => depth,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Flash {
    Auto,
    On,
    Off,
}

impl Flash {
    fn name(self) -> &'static str {
        ["auto", "on", "off"][self as usize]
    }
}

const N_UBATCH: usize = 512;
/// Tokens that go through the model where the others of a depth are copies of them, as in `hae bench`.
const DECODED: usize = 64;

type Done<T = ()> = Result<T, Box<dyn Error>>;

fn cache_type(name: &str) -> Done<sys::ggml_type> {
    Ok(match name {
        "f32" => sys::GGML_TYPE_F32,
        "f16" => sys::GGML_TYPE_F16,
        "bf16" => sys::GGML_TYPE_BF16,
        "q8_0" => sys::GGML_TYPE_Q8_0,
        "q4_0" => sys::GGML_TYPE_Q4_0,
        _ => return Err(format!("{name}: expected f32, f16, bf16, q8_0 or q4_0").into()),
    })
}

/// A context that lives as long as the program.
struct Context {
    raw: *mut sys::llama_context,
    model_size: u64,
    n_vocab: u64,
    n_embd: usize,
    n_ctx: u32,
    state: u64,
    pos: i32,
}

impl Context {
    fn new(args: &Args) -> Done<Self> {
        let path = CString::new(args.model.as_str())?;
        let pictures = args.images * args.image_tokens;
        let cells = args.before() + pictures + args.n_prompt + args.n_gen;
        let n_ctx = u32::try_from(cells)?.next_multiple_of(256);
        let (type_k, type_v) = (cache_type(&args.ctk)?, cache_type(&args.ctv)?);
        extern "C" fn quiet(
            _: sys::ggml_log_level,
            _: *const std::ffi::c_char,
            _: *mut std::ffi::c_void,
        ) {
        }
        // SAFETY: plain calls with default parameters; the path lives during the call, what comes
        // back is checked, and both model and context live to the end of the program.
        unsafe {
            sys::llama_log_set(Some(quiet), std::ptr::null_mut());
            sys::llama_backend_init();
            let model =
                sys::llama_model_load_from_file(path.as_ptr(), sys::llama_model_default_params());
            if model.is_null() {
                return Err(format!("{}: cannot be loaded", args.model).into());
            }
            let mut params = sys::llama_context_default_params();
            params.n_ctx = n_ctx;
            params.n_batch = n_ctx.min(2048);
            params.n_ubatch = n_ctx.min(N_UBATCH as u32);
            params.n_threads = args.n_threads;
            params.n_threads_batch = args.n_threads;
            params.type_k = type_k;
            params.type_v = type_v;
            params.flash_attn_type = match args.fa {
                Flash::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
                Flash::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
                Flash::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            };
            if args.depth_copies {
                // Copies come in as a second sequence, in the cells of the same cache.
                params.n_seq_max = 2;
                params.kv_unified = true;
            }
            let raw = sys::llama_init_from_model(model, params);
            if raw.is_null() {
                return Err(format!("no context of {n_ctx} cells").into());
            }
            let n_vocab = sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model));
            Ok(Context {
                raw,
                model_size: sys::llama_model_size(model),
                n_vocab: u64::try_from(n_vocab)?,
                n_embd: usize::try_from(sys::llama_model_n_embd(model))?,
                n_ctx,
                state: args.seed,
                pos: 0,
            })
        }
    }

    /// Knuth's MMIX generator: any reproducible numbers will do.
    fn random(&mut self) -> u64 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.state >> 33
    }

    /// Takes `n` random tokens in, a micro-batch a call as `hae` does, and waits for the logits.
    fn feed(&mut self, n: usize) -> Done {
        self.batches(n, true, |context, rows, batch| {
            let n_vocab = context.n_vocab;
            let mut tokens: Vec<i32> = (0..rows)
                .map(|_| (context.random() % n_vocab) as i32)
                .collect();
            batch.token = tokens.as_mut_ptr();
            context.decode(batch)
        })
    }

    /// Takes a picture of `n` made-up embeddings in; no logits come of it.
    fn feed_picture(&mut self, n: usize) -> Done {
        self.batches(n, false, |context, rows, batch| {
            let mut rows: Vec<f32> = (0..rows * context.n_embd)
                .map(|_| context.random() as f32 / (1u64 << 31) as f32 * 2.0 - 1.0)
                .collect();
            batch.embd = rows.as_mut_ptr();
            context.decode(batch)
        })
    }

    fn batches(
        &mut self,
        n: usize,
        wanted: bool,
        mut put: impl FnMut(&mut Self, usize, &mut sys::llama_batch) -> Done,
    ) -> Done {
        let mut left = n;
        while left > 0 {
            let rows = left.min(N_UBATCH);
            left -= rows;
            let mut pos: Vec<i32> = (self.pos..).take(rows).collect();
            self.pos += rows as i32;
            let mut seq = 0;
            let mut seq_id = vec![&raw mut seq; rows];
            let mut n_seq_id = vec![1; rows];
            let mut logits = vec![0; rows];
            logits[rows - 1] = i8::from(wanted && left == 0);
            let mut batch = sys::llama_batch {
                n_tokens: rows as i32,
                token: std::ptr::null_mut(),
                embd: std::ptr::null_mut(),
                pos: pos.as_mut_ptr(),
                n_seq_id: n_seq_id.as_mut_ptr(),
                seq_id: seq_id.as_mut_ptr(),
                logits: logits.as_mut_ptr(),
            };
            put(self, rows, &mut batch)?;
        }
        if wanted {
            // SAFETY: the last row asked for logits.
            let logits = unsafe { sys::llama_get_logits_ith(self.raw, -1) };
            if logits.is_null() {
                return Err("no logits".into());
            }
        }
        Ok(())
    }

    fn decode(&mut self, batch: &sys::llama_batch) -> Done {
        // SAFETY: every array has a row for each token and outlives the call.
        let status = unsafe { sys::llama_decode(self.raw, *batch) };
        match status {
            0 => Ok(()),
            _ => Err(format!("llama_decode: status {status}").into()),
        }
    }

    /// Bytes of K and V of all cells in use; what llama.cpp writes beside them is next to nothing.
    fn bytes(&mut self) -> usize {
        // SAFETY: the context is alive.
        unsafe { sys::llama_state_seq_get_size(self.raw, 0) }
    }

    /// Lets `n` more positions hold what the first ones do: their state, read in again as another
    /// sequence at the next positions, whose cells then pass to the first sequence.
    fn copy(&mut self, n: usize) -> Done {
        let mut state = vec![0u8; self.bytes()];
        // SAFETY: the buffer has as many bytes as the state.
        let written =
            unsafe { sys::llama_state_seq_get_data(self.raw, state.as_mut_ptr(), state.len(), 0) };
        // A mark, the sequence, streams, cells; then for each cell its position, its number of
        // sequences, and these.
        const HEAD: usize = 16;
        const CELL: usize = 12;
        let held = self.pos;
        let known = written == state.len()
            && int(&state, 8) == 1
            && int(&state, 12) == held
            && (0..held).all(|i| {
                let at = HEAD + i as usize * CELL;
                int(&state, at) == i && int(&state, at + 4) == 1
            });
        if !known {
            return Err(
                "the state of this cache cannot be copied, measure without --depth-copies".into(),
            );
        }
        if !n.is_multiple_of(held as usize) {
            return Err(format!("-d: expected a multiple of {DECODED} with --depth-copies").into());
        }
        for _ in 0..n / held as usize {
            for i in 0..held {
                let at = HEAD + i as usize * CELL;
                state[at..at + 4].copy_from_slice(&(self.pos + i).to_ne_bytes());
            }
            self.pos += held;
            // SAFETY: the context is alive and has two sequences; the state is its own but for positions.
            unsafe {
                let read = sys::llama_state_seq_set_data(self.raw, state.as_ptr(), state.len(), 1);
                if read != state.len() {
                    return Err("the copies do not fit into the cache".into());
                }
                let memory = sys::llama_get_memory(self.raw);
                sys::llama_memory_seq_cp(memory, 1, 0, -1, -1);
                sys::llama_memory_seq_rm(memory, 1, -1, -1);
            }
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.pos = 0;
        // SAFETY: the context is alive.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.raw), true) };
    }
}

/// Four bytes of a buffer.
fn int(bytes: &[u8], at: usize) -> i32 {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(-1, |&bytes| i32::from_ne_bytes(bytes))
}

/// Main memory held at most, bytes; Linux only.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib * 1024)
}

/// llama.cpp's flags of several letters, which clap would take for several flags.
fn words() -> impl Iterator<Item = String> {
    std::env::args().map(|word| match word.as_str() {
        "-pg" | "-fa" | "-ctk" | "-ctv" => format!("-{word}"),
        _ => word,
    })
}

fn main() {
    let mut args = Args::parse_from(words());
    match args.pg[..] {
        [] => {}
        [n_prompt, n_gen] => (args.n_prompt, args.n_gen) = (n_prompt, n_gen),
        _ => {
            eprintln!("hae-stock: -pg: expected two numbers, as in -pg 512,128");
            std::process::exit(2);
        }
    }
    if let Err(e) = measure(&args) {
        eprintln!("hae-stock: {e}");
        std::process::exit(2);
    }
}

fn measure(args: &Args) -> Done {
    let mut context = Context::new(args)?;
    // The first decode of a context makes its graphs.
    context.feed(1)?;
    context.clear();
    if args.warmup {
        let before = args.n_depth + args.images * args.image_tokens + args.n_prompt;
        context.feed(before.clamp(1, N_UBATCH))?;
        context.clear();
        for _ in 0..2.min(context.n_ctx) {
            context.feed(1)?;
        }
        context.clear();
    }
    let (prompted, before) = (args.n_prompt > 0, args.before());
    let decoded = match args.depth_copies {
        true => before.min(DECODED),
        false => before,
    };
    if decoded > 0 {
        context.feed(decoded)?;
    }
    if before > decoded {
        context.copy(before - decoded)?;
    }
    let start = Instant::now();
    for _ in 0..args.images {
        context.feed_picture(args.image_tokens)?;
    }
    if prompted {
        context.feed(args.n_prompt)?;
    }
    let first = start.elapsed().as_secs_f64() * 1e3;
    let start = Instant::now();
    for _ in 0..args.n_gen {
        context.feed(1)?;
    }
    let answer = start.elapsed().as_secs_f64() * 1e3;
    let cells = usize::try_from(context.pos)?;
    let in_use = context.bytes();
    // Null where nothing was measured, as in `hae bench`.
    let number = |on: bool, value: f64| match on {
        true => value.to_string(),
        false => "null".to_owned(),
    };
    let ttft = number(prompted, first);
    let tpot = number(args.n_gen > 0, answer / args.n_gen.max(1) as f64);
    let total = number(prompted, first + answer);
    println!(
        "{{\"kv_policy\":\"stock\",\"model_size\":{},\"n_threads\":{},\"flash_attn\":\"{}\",\"type_k\":\"{}\",\
         \"type_v\":\"{}\",\"n_prompt\":{},\"n_gen\":{},\"n_depth\":{},\"depth_copies\":{},\"n_images\":{},\
         \"kv_cells_end\":{cells},\"kv_bytes_in_use\":{in_use},\"kv_bytes_allocated\":{allocated},\
         \"kv_bytes_allocated_peak\":{allocated},\"peak_rss_bytes\":{},\"prefill_ms_median\":{ttft},\
         \"tpot_ms_median\":{tpot},\"samples\":{{\"prefill_ms\":[{ttft}],\"ttft_ms\":[{ttft}],\
         \"tpot_ms\":[{tpot}],\"total_ms\":[{total}]}}}}",
        context.model_size,
        args.n_threads,
        args.fa.name(),
        args.ctk,
        args.ctv,
        args.n_prompt,
        args.n_gen,
        args.n_depth,
        u8::from(args.depth_copies),
        args.images,
        peak_rss().map_or("null".to_owned(), |bytes| bytes.to_string()),
        allocated = in_use / cells.max(1) * context.n_ctx as usize,
    );
    Ok(())
}
