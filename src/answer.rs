//! An answer and what it cost: the one report, whoever asked.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::attend::Shares;
use crate::cache::{BinStore, Counts, PerModality};
use crate::controller::Report;
use crate::engine::Engine;
use crate::generate::{self, Finish, RowStore, Session, Traffic};

/// An answer with its costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// What the model said, without the token that ended it.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Cancelled before the whole question was read: the conversation is as it was before.
    #[serde(skip)]
    pub taken_back: bool,
    /// How many tokens went in and came out.
    pub tokens: Tokens,
    /// The cache after the answer, and its memory.
    pub kv: Kv,
    /// What decoding steps attended to, where they looked cells up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attended: Option<Shares>,
    /// How long each part took.
    pub timings: Timings,
    /// What has left the cache so far.
    pub evicted: Evicted,
    /// Where rows of it wait, where some did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bin: Option<Bin>,
    /// The policy that it was given under.
    pub policy: PolicyReport,
}

/// Tokens of one turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    /// Of this turn's prompt, without the token that the answer before it was cut off at, which
    /// goes through the model with it: that one was generated.
    pub prompt: PerModality,
    /// Visual tokens of each picture of this turn.
    pub images: Vec<usize>,
    /// Tokens of the answer, without the one that ended it.
    pub generated: usize,
}

/// The KV cache after the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kv {
    /// Cells by modality and state, and the most that were ever taken.
    pub cells: Counts,
    /// The most cells in use outside of prefills: what a budget bounds.
    pub peak_decoding: usize,
    /// Cells that the cache can hold.
    pub n_cells: usize,
    /// Bytes of one cell over all layers, K and V.
    pub bytes_per_cell: u64,
    /// Bytes that the cells in use take.
    pub bytes_in_use: u64,
    /// Bytes of the most cells ever in use, the whole prompt included.
    pub bytes_peak: u64,
    /// Bytes of `peak_decoding`.
    pub bytes_peak_decoding: u64,
    /// Bytes of the buffers behind the cache, whatever is in use.
    pub bytes_allocated: u64,
    /// The most that these ever were, trial runs included.
    pub bytes_allocated_peak: u64,
    /// Bytes of evicted rows that wait in main memory, outside of the cache.
    #[serde(default)]
    pub bytes_host: u64,
}

impl Kv {
    /// That of a session now, with what its controller reports.
    pub fn of<E: Engine>(session: &Session<E>, report: &Report) -> Self {
        let (cells, peak_decoding) = (report.cells, report.peak_decoding);
        let bytes = session.engine.kv_bytes();
        Kv {
            cells,
            peak_decoding,
            n_cells: session.engine.n_cells(),
            bytes_per_cell: bytes.per_cell,
            bytes_in_use: bytes.per_cell * cells.cells() as u64,
            bytes_peak: bytes.per_cell * cells.peak as u64,
            bytes_peak_decoding: bytes.per_cell * peak_decoding as u64,
            bytes_allocated: bytes.allocated,
            bytes_allocated_peak: session.peak_bytes().max(bytes.allocated),
            bytes_host: session.store().bytes_in_ram(),
        }
    }
}

/// Rows of evicted tokens outside of the cache, over the whole conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// Where they wait.
    pub store: BinStore,
    /// Rows that wait there now.
    pub rows: usize,
    /// Their bytes. Those in main memory are in [`Kv::bytes_host`], too.
    pub bytes: u64,
    /// Rows that went there.
    pub rows_out: u64,
    /// Rows that came back from there.
    pub rows_back: u64,
    /// Visual tokens that came back by going through the model again.
    pub rows_decoded: u64,
    /// Rows that made room for others, or were lost.
    pub rows_dropped: u64,
    /// Milliseconds that copying took, both ways.
    pub ms: f64,
    /// Milliseconds that answers waited for what came back to them.
    pub pause_ms: f64,
    /// Why it keeps nothing any more, where something went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

impl Bin {
    /// `None` where nothing ever left for it or came back.
    pub fn of(store: &RowStore) -> Option<Self> {
        let traffic = store.traffic();
        let trouble = store.trouble().map(str::to_owned);
        let idle = traffic == Traffic::default() && store.rows() == 0 && trouble.is_none();
        (!idle).then(|| Bin {
            store: store.kind(),
            rows: store.rows(),
            bytes: store.bytes(),
            rows_out: traffic.rows_out,
            rows_back: traffic.rows_back,
            rows_decoded: traffic.rows_decoded,
            rows_dropped: traffic.rows_dropped,
            ms: traffic.time.as_secs_f64() * 1e3,
            pause_ms: traffic.pause.as_secs_f64() * 1e3,
            trouble,
        })
    }
}

/// Milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Cutting up and encoding the pictures; the prompt's tokenization is in it. Where pictures are
    /// encoded once for several policies, each of them reports that time.
    pub vision_encode_ms: f64,
    /// The trial run of the first layers before the prefill (`--dap-mode early` or `midway`).
    pub probe_ms: f64,
    /// The prompt through the model, and the eviction after it, without the trial run.
    pub prefill_ms: f64,
    /// From the question to the first token, encoding included.
    pub ttft_ms: Option<f64>,
    /// Mean time of a token after the first.
    pub tpot_ms: Option<f64>,
    /// From the first token to the end of the answer.
    pub decode_ms: f64,
}

impl Timings {
    /// Those of a generation whose prompt took `encode` to be made.
    pub fn of(times: &generate::Timings, encode: Duration) -> Self {
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        Timings {
            vision_encode_ms: ms(encode),
            probe_ms: ms(times.probe),
            prefill_ms: ms(times.prefill),
            ttft_ms: times.first_token.map(|t| ms(t + encode)),
            tpot_ms: times.per_token().map(ms),
            decode_ms: ms(times.decode),
        }
    }
}

/// Counts over the whole conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evicted {
    /// Tokens that were pruned before a prompt's prefill or removed right after it.
    pub after_prefill: usize,
    /// Tokens that were removed while answers were written.
    pub in_decoding: usize,
    /// Decoding steps that removed tokens.
    pub flushes: usize,
    /// Times that a token came back from the recycle bin.
    pub restores: usize,
    /// Evicted tokens that came back for a later question.
    pub recalled: usize,
}

impl Evicted {
    /// Those of a session so far.
    pub fn of(report: &Report) -> Self {
        Evicted {
            after_prefill: report.evicted_after_prefill,
            in_decoding: report.evicted_in_decoding,
            flushes: report.flushes,
            restores: report.restores,
            recalled: report.recalled,
        }
    }
}

/// A policy as reports show it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PolicyReport {
    /// Its name, as in [`crate::policy::names`].
    pub name: &'static str,
    /// Every parameter with its value.
    pub params: serde_json::Value,
    /// The file of `hae calibrate` that parameters were taken from, where one was.
    pub calibration: Option<String>,
}

impl PolicyReport {
    /// That of a session's policy.
    pub fn of(report: Report) -> Self {
        PolicyReport {
            name: report.policy,
            params: report.params,
            calibration: None,
        }
    }
}
