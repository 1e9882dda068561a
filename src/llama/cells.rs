//! The cells of a context's KV cache: which there are, moving them together, making them fewer or
//! more, and single rows in host memory. Safe names for `llama-hae-kv.h`, which
//! `patches/llama-cpp-sys-2` adds to llama.cpp.
//!
//! Only a plain cache can do this. Sliding windows, recurrent layers and caches that are split over
//! devices refuse, and nothing happens.

use std::collections::HashMap;

use llama_cpp_sys_2 as sys;

use super::engine::LlamaEngine;
use super::{log, memory};
use crate::cache::{Cell, Pos};
use crate::engine::{KvBytes, Part, SeqId};
use crate::error::{Error, Result};

/// The error behind a negative status.
fn reason(status: i64) -> String {
    let reason = match i32::try_from(status) {
        Ok(sys::LLAMA_HAE_KV_UNSUPPORTED) => "the model's memory is no plain KV cache",
        Ok(sys::LLAMA_HAE_KV_ARGUMENT) => "an argument is out of range, or a cell is empty",
        Ok(sys::LLAMA_HAE_KV_NO_ROOM) => "too few cells",
        Ok(sys::LLAMA_HAE_KV_PRESENT) => "the sequence holds one of the positions already",
        Ok(sys::LLAMA_HAE_KV_MEMORY) => "not enough memory",
        _ => "the cache could not be changed",
    };
    log::take_reason(reason)
}

fn checked(call: &'static str, status: impl Into<i64>) -> Result<usize> {
    let status = status.into();
    usize::try_from(status).map_err(|_| Error::llama(call, reason(status)))
}

fn count(call: &'static str, n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::llama(call, format!("{n} cells at once")))
}

impl LlamaEngine {
    /// Cells that the cache has now; [`crate::engine::Engine::n_cells`] is the most it may get.
    ///
    /// # Errors
    /// [`Error::Llama`] if the memory is no plain cache.
    pub fn cells_now(&self) -> Result<usize> {
        // SAFETY: the context is alive.
        let n = unsafe { sys::llama_hae_kv_size(self.raw.as_ptr()) };
        checked("llama_hae_kv_size", n)
    }

    /// Leaves the size of the cache to [`LlamaEngine::resize`] alone.
    pub fn resize_by_hand(&mut self) {
        self.room.resizable = false;
    }

    /// Whether the memory is a plain cache, whose cells can be read and moved.
    pub(super) fn is_plain(&self) -> bool {
        self.cells_now().is_ok()
    }

    /// The cells that a batch went to, in row order.
    pub(super) fn cells_of(&self, parts: &[Part<'_>], cells: &mut Vec<Cell>) -> Result<()> {
        let batch = match parts {
            [part] if part.batch.input.len() > self.n_ubatch() => &part.batch,
            _ => return self.batch_cells(cells),
        };
        // Several micro-batches, of which llama.cpp remembers the last: by position then.
        let map = self.cells()?;
        let own = map
            .iter()
            .zip(0..)
            .filter(|(cell, _)| cell.seq == batch.seq);
        let by_pos: HashMap<Pos, Cell> = own.map(|(cell, at)| (cell.pos, at)).collect();
        cells.clear();
        cells.extend(batch.pos.iter().filter_map(|pos| by_pos.get(pos)));
        Ok(())
    }

    /// The position in each cell, `None` where it is empty: `out` gets one entry a cell.
    ///
    /// # Errors
    /// [`Error::Llama`] if the memory is no plain cache.
    pub fn cell_map(&self, out: &mut Vec<Option<Pos>>) -> Result<()> {
        let cells = self.cells()?;
        out.clear();
        out.extend(cells.iter().map(|c| (c.pos >= 0).then_some(c.pos)));
        Ok(())
    }

    /// The cells that hold tokens of the sequence, ascending, with their positions.
    ///
    /// # Errors
    /// [`Error::Llama`] if the memory is no plain cache.
    pub fn cells_of_seq(&self, seq: SeqId) -> Result<Vec<(Cell, Pos)>> {
        let cells = self.cells()?;
        let own = cells.iter().zip(0..).filter(|(cell, _)| cell.seq == seq);
        Ok(own.map(|(cell, at)| (at, cell.pos)).collect())
    }

    /// Every cell; an empty one is of sequence -1.
    pub(super) fn cells(&self) -> Result<Vec<sys::llama_hae_cell>> {
        const CALL: &str = "llama_hae_kv_cells";
        let n = self.cells_now()?;
        let empty = sys::llama_hae_cell {
            pos: -1,
            n_seq: 0,
            seq: -1,
        };
        let mut cells = vec![empty; n];
        // SAFETY: the context is alive, and `cells` has room for n cells.
        let status = unsafe {
            sys::llama_hae_kv_cells(self.raw.as_ptr(), cells.as_mut_ptr(), count(CALL, n)?)
        };
        checked(CALL, status)?;
        Ok(cells)
    }

    /// The cells of the rows of the last micro-batch, in row order; none after cells have moved or
    /// the cache has another size.
    ///
    /// # Errors
    /// [`Error::Llama`] if the memory is no plain cache.
    pub fn batch_cells(&self, out: &mut Vec<Cell>) -> Result<()> {
        const CALL: &str = "llama_hae_kv_batch_cells";
        out.clear();
        out.resize(self.n_ubatch(), 0);
        // SAFETY: the context is alive, and `out` has as much room as is said.
        let n = unsafe {
            sys::llama_hae_kv_batch_cells(
                self.raw.as_ptr(),
                out.as_mut_ptr(),
                count(CALL, out.len())?,
            )
        };
        out.truncate(checked(CALL, n)?);
        Ok(())
    }

    /// Bytes of a cell and of the cache's buffers; `None` if the memory is no plain cache.
    pub(super) fn cache_bytes(&self) -> Option<KvBytes> {
        let mut allocated = 0;
        // SAFETY: the context is alive, and `allocated` is a live variable.
        let per_cell = unsafe { sys::llama_hae_kv_bytes(self.raw.as_ptr(), &raw mut allocated) };
        Some(KvBytes {
            per_cell: u64::try_from(per_cell).ok()?,
            allocated: allocated as u64,
        })
    }

    /// Moves the fewest cells that make the used ones `0..used`; `moves` gets the pairs (from, to),
    /// ascending in both. K and V keep their bits, and the next token takes the first free cell.
    ///
    /// # Errors
    /// [`Error::Llama`] if the memory is no plain cache or the device fails; nothing has moved then.
    pub fn compact_cells(&mut self, moves: &mut Vec<(Cell, Cell)>) -> Result<()> {
        const CALL: &str = "llama_hae_kv_compact";
        // A move fills a hole from above, so there cannot be more than half as many as cells.
        let most = self.cells_now()? / 2;
        let (mut from, mut to) = (vec![0; most], vec![0; most]);
        log::forget();
        // SAFETY: the context is alive and borrowed mutably; both arrays have room for `most`.
        let n = unsafe {
            sys::llama_hae_kv_compact(
                self.raw.as_ptr(),
                from.as_mut_ptr(),
                to.as_mut_ptr(),
                count(CALL, most)?,
            )
        };
        let n = checked(CALL, n)?;
        moves.clear();
        moves.extend(from.into_iter().zip(to).take(n));
        Ok(())
    }

    /// Gives the cache `n_cells` cells, rounded up to a multiple of 256, and returns how many that
    /// are. The used ones have to lie below: compact first. Takes the memory of the old cache and
    /// of one layer while it works.
    ///
    /// # Errors
    /// [`Error::Option`] for more than the machine can hold; [`Error::Llama`] for more than `n_ctx`,
    /// for fewer than are used, for want of memory, or if the memory is no plain cache. The cache is
    /// then as it was.
    pub fn resize(&mut self, n_cells: usize) -> Result<usize> {
        const CALL: &str = "llama_hae_kv_resize";
        let n_cells = count(CALL, n_cells)?;
        if n_cells as usize > self.cells_now()? {
            memory::check(
                &self.model,
                self.model.n_layer(),
                n_cells.min(self.options.n_ctx),
                self.options.type_k,
                self.options.type_v,
            )?;
        }
        log::forget();
        let _blocks = memory::OwnBlocks::new();
        // SAFETY: the context is alive and borrowed mutably; no graph of it is running.
        let n = unsafe { sys::llama_hae_kv_resize(self.raw.as_ptr(), n_cells) };
        checked(CALL, n)
    }

    /// Bytes that [`LlamaEngine::rows`] takes for a cell.
    ///
    /// # Errors
    /// [`Error::Llama`] if the memory is no plain cache.
    pub fn row_bytes(&self) -> Result<usize> {
        // SAFETY: the context is alive.
        let n = unsafe { sys::llama_hae_kv_rows_size(self.raw.as_ptr()) };
        checked("llama_hae_kv_rows_size", n)
    }

    /// What these cells hold, in all layers: one block of [`LlamaEngine::row_bytes`] a cell.
    ///
    /// # Errors
    /// [`Error::Llama`] for an empty cell or one that does not exist.
    pub fn rows(&mut self, cells: &[Cell]) -> Result<Vec<u8>> {
        const CALL: &str = "llama_hae_kv_rows_get";
        let n = count(CALL, cells.len())?;
        let size = self.row_bytes()?.saturating_mul(cells.len());
        let mut rows = Vec::new();
        memory::reserve(
            &mut rows,
            size,
            CALL,
            "evicted text",
            "a smaller `bin_host_mib`",
        )?;
        rows.resize(size, 0);
        log::forget();
        // SAFETY: the context is alive and borrowed mutably; `cells` holds n cells, and the size of
        // `rows` is passed along and checked there.
        let status = unsafe {
            sys::llama_hae_kv_rows_get(
                self.raw.as_ptr(),
                cells.as_ptr(),
                n,
                rows.as_mut_ptr().cast(),
                rows.len(),
            )
        };
        checked(CALL, status)?;
        Ok(rows)
    }

    /// Puts rows back that [`LlamaEngine::rows`] has read from a cache of the same model and types,
    /// into the lowest free cells, as the sequence's; `cells` gets them. `positions` are those that
    /// the rows had.
    ///
    /// # Errors
    /// [`Error::Llama`] if the rows are of other positions, if the sequence has one of them, or if
    /// there are too few free cells. The cache is then as it was.
    pub fn put_rows(
        &mut self,
        seq: SeqId,
        positions: &[Pos],
        rows: &[u8],
        cells: &mut Vec<Cell>,
    ) -> Result<()> {
        const CALL: &str = "llama_hae_kv_rows_set";
        let n = count(CALL, positions.len())?;
        cells.clear();
        cells.resize(positions.len(), 0);
        log::forget();
        // SAFETY: the context is alive and borrowed mutably; positions and cells have n elements,
        // and the size of `rows` is passed along and checked there.
        let status = unsafe {
            sys::llama_hae_kv_rows_set(
                self.raw.as_ptr(),
                seq,
                positions.as_ptr(),
                n,
                rows.as_ptr().cast(),
                rows.len(),
                cells.as_mut_ptr(),
            )
        };
        checked(CALL, status)?;
        Ok(())
    }
}
