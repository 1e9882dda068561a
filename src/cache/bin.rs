//! Where rows of evicted tokens wait outside of the cache.

/// Where rows of evicted tokens wait (`--bin-store`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BinStore {
    /// In a temporary file, which is gone when the process is.
    #[default]
    File,
    /// In main memory.
    Ram,
    /// Nowhere.
    Off,
}

/// Where rows of evicted tokens wait, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BinOptions {
    /// Where.
    pub store: BinStore,
    /// Bytes of rows at most.
    pub max_bytes: u64,
}

impl BinOptions {
    /// Nothing is kept.
    pub const OFF: BinOptions = BinOptions {
        store: BinStore::Off,
        max_bytes: 0,
    };

    /// In main memory, so many bytes at most.
    pub fn ram(max_bytes: u64) -> Self {
        BinOptions {
            store: BinStore::Ram,
            max_bytes,
        }
    }
}

/// A file, and 4 GiB.
impl Default for BinOptions {
    fn default() -> Self {
        BinOptions {
            store: BinStore::File,
            max_bytes: 4 << 30,
        }
    }
}
