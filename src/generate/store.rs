//! Rows of evicted tokens outside of the cache: K and V as they were, in a file without a name or in
//! main memory, until they are asked for.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cache::{BinOptions, BinStore, Cell, Pos};
use crate::engine::Engine;
use crate::error::{Error, Result};

/// Rows are copied in pieces of about this size: large enough for a disk, small beside the cache.
const PIECE: usize = 16 << 20;

/// Rows of tokens that were evicted at once, as a session file holds them.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Saved {
    /// `[n]`, in the order of the rows.
    pub pos: Vec<Pos>,
    /// `[n, row bytes]`
    #[serde(with = "serde_bytes")]
    pub rows: Vec<u8>,
}

/// Whether rows can be those of tokens that went in before position `next` and are not `held` now;
/// they may come from a file.
pub(super) fn check(saved: &[Saved], next: Pos, mut held: HashSet<Pos>) -> Result<()> {
    let size = |Saved { pos, rows }: &Saved| rows.len().checked_div(pos.len());
    for one @ Saved { pos, rows } in saved {
        let n = pos.len();
        let like_others = size(one) == size(&saved[0]);
        if n == 0 || rows.is_empty() || rows.len() % n != 0 || !like_others {
            return Err(Error::contract(format!(
                "{} bytes for {n} rows",
                rows.len()
            )));
        }
        let odd = pos
            .iter()
            .find(|&&pos| !(0..next).contains(&pos) || !held.insert(pos));
        if let Some(pos) = odd {
            return Err(Error::contract(format!(
                "rows of position {pos} in the bin's store"
            )));
        }
    }
    Ok(())
}

/// A token that is leaving the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Leaving {
    pub cell: Cell,
    pub pos: Pos,
    /// The attention that it had: where the store is full, the least of it goes first.
    pub asked: f32,
}

/// A row that waits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Kept {
    pub pos: Pos,
    slot: u64,
    asked: f32,
}

/// Of tokens that left at once.
#[derive(Clone, Debug)]
struct Batch {
    is_text: bool,
    rows: Vec<Kept>,
}

/// What went through a store so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Rows that were kept.
    pub rows_out: u64,
    /// Rows that came back from it.
    pub rows_back: u64,
    /// Rows that made room for others, or were lost.
    pub rows_dropped: u64,
    /// Visual tokens that came back by going through the model again, since it had no rows of them.
    pub rows_decoded: u64,
    /// Copying, in both directions.
    pub time: Duration,
    /// What answers waited for what came back to them, all that it took included.
    pub pause: Duration,
}

/// Rows of evicted tokens, in slots of one size.
#[derive(Debug)]
pub struct RowStore {
    options: BinOptions,
    place: Place,
    row_bytes: usize,
    /// Oldest first.
    batches: VecDeque<Batch>,
    /// Slots of the place that hold nothing.
    free: BTreeSet<u64>,
    /// Slots that the place has.
    slots: u64,
    traffic: Traffic,
    /// Why nothing is kept any more.
    trouble: Option<String>,
}

impl Default for RowStore {
    fn default() -> Self {
        RowStore::new(BinOptions::OFF)
    }
}

impl RowStore {
    /// Empty. Nothing is made on a disk before there are rows.
    pub fn new(options: BinOptions) -> Self {
        RowStore {
            options,
            place: Place::None,
            row_bytes: 0,
            batches: VecDeque::new(),
            free: BTreeSet::new(),
            slots: 0,
            traffic: Traffic::default(),
            trouble: None,
        }
    }

    /// Where rows wait.
    pub fn kind(&self) -> BinStore {
        self.options.store
    }

    /// Whether it keeps nothing at all.
    pub fn is_off(&self) -> bool {
        self.options.store == BinStore::Off || self.options.max_bytes == 0
    }

    /// Rows that wait.
    pub fn rows(&self) -> usize {
        self.batches.iter().map(|batch| batch.rows.len()).sum()
    }

    /// Bytes of the rows that wait.
    pub fn bytes(&self) -> u64 {
        self.rows() as u64 * self.row_bytes as u64
    }

    /// Those of them in main memory.
    pub fn bytes_in_ram(&self) -> u64 {
        match self.options.store {
            BinStore::Ram => self.slots * self.row_bytes as u64,
            BinStore::File | BinStore::Off => 0,
        }
    }

    /// What went through it.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Counts what an answer waited.
    pub(super) fn paused(&mut self, pause: Duration) {
        self.traffic.pause += pause;
    }

    /// Counts visual tokens that went through the model again.
    pub(super) fn decoded(&mut self, rows: usize) {
        self.traffic.rows_decoded += rows as u64;
    }

    /// Why nothing is kept any more, where something went wrong.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Positions of the rows that wait, oldest first.
    pub fn positions(&self) -> impl Iterator<Item = Pos> + '_ {
        let rows = self.batches.iter().flat_map(|batch| &batch.rows);
        rows.map(|row| row.pos)
    }

    /// Copies rows that are about to be removed. What does not fit takes the place of older rows and of
    /// those that had less attention; where no place can be had, [`RowStore::trouble`] says why.
    ///
    /// # Errors
    /// The engine's own.
    pub(super) fn keep(
        &mut self,
        engine: &mut dyn Engine,
        mut leaving: Vec<Leaving>,
        is_text: bool,
    ) -> Result<()> {
        if self.is_off() || self.trouble.is_some() || leaving.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        if !self.learn_row_bytes(engine, leaving[0].cell)? {
            return Ok(());
        }
        let most = self.most_rows();
        self.traffic.rows_dropped += leaving.len().saturating_sub(most) as u64;
        most_asked(&mut leaving, most, |row| row.asked);
        leaving.sort_unstable_by_key(|row| row.pos);
        let rows = self.places(leaving.iter().map(|row| (row.pos, row.asked)));
        let written = self.write_out(engine, &leaving, &rows)?;
        let n = rows.len() as u64;
        match self.settle(written, Batch { is_text, rows }) {
            true => self.traffic.rows_out += n,
            false => self.traffic.rows_dropped += n,
        }
        self.traffic.time += start.elapsed();
        Ok(())
    }

    /// Copies rows of the cache to their places, piece by piece. What the place has to say about it is
    /// no error of the engine's.
    fn write_out(
        &mut self,
        engine: &mut dyn Engine,
        leaving: &[Leaving],
        rows: &[Kept],
    ) -> Result<io::Result<()>> {
        if let Err(error) = self.reserve() {
            return Ok(Err(error));
        }
        let per_piece = self.rows_a_piece();
        let (mut cells, mut piece) = (Vec::with_capacity(per_piece), Vec::new());
        for (leaving, rows) in leaving.chunks(per_piece).zip(rows.chunks(per_piece)) {
            cells.clear();
            cells.extend(leaving.iter().map(|row| row.cell));
            piece.clear();
            engine.save_rows(&cells, &mut piece)?;
            if let Err(error) = self.write(rows, &piece) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    /// Rows that it may hold at once.
    fn most_rows(&self) -> usize {
        let most = self.options.max_bytes / self.row_bytes.max(1) as u64;
        usize::try_from(most).unwrap_or(usize::MAX)
    }

    /// Places for rows of these positions that were asked for so much, after making room for them.
    fn places(&mut self, rows: impl ExactSizeIterator<Item = (Pos, f32)>) -> Vec<Kept> {
        let n = rows.len();
        self.make_room((self.rows() + n).saturating_sub(self.most_rows()));
        let kept = rows.zip(self.take_slots(n));
        kept.map(|((pos, asked), slot)| Kept { pos, slot, asked })
            .collect()
    }

    /// Lists a batch that was written; false: it was not, and nothing is kept from now on.
    fn settle(&mut self, written: io::Result<()>, batch: Batch) -> bool {
        match written {
            Ok(()) => self.batches.push_back(batch),
            Err(error) => {
                self.release(&batch.rows);
                self.trouble = Some(error.to_string());
                return false;
            }
        }
        true
    }

    /// Rows of text that came from a session.
    pub fn push(&mut self, saved: &Saved) {
        let n = saved.pos.len();
        if self.is_off() || self.trouble.is_some() || n == 0 {
            return;
        }
        self.row_bytes = saved.rows.len() / n;
        if saved.rows.len() as u64 > self.options.max_bytes {
            self.traffic.rows_dropped += n as u64;
            return;
        }
        let rows = self.places(saved.pos.iter().map(|&pos| (pos, 0.0)));
        let reserved = self.reserve();
        let written = reserved.and_then(|()| self.write(&rows, &saved.rows));
        let is_text = true;
        self.settle(written, Batch { is_text, rows });
    }

    /// Rows of text, batch by batch, oldest first, as a session keeps them. Visual ones come back
    /// from their embeddings.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read.
    pub fn texts(&self) -> Result<Vec<Saved>> {
        let texts = self.batches.iter().filter(|batch| batch.is_text);
        let read = texts.map(|batch| {
            let mut rows = Vec::new();
            self.read(&batch.rows, &mut rows)
                .map_err(|e| Error::io("the bin's store", e))?;
            let pos = batch.rows.iter().map(|row| row.pos).collect();
            Ok(Saved { pos, rows })
        });
        read.collect()
    }

    /// Rows in each batch of text, newest first.
    pub(super) fn texts_newest_first(&self) -> impl Iterator<Item = usize> + '_ {
        let texts = self.batches.iter().rev().filter(|batch| batch.is_text);
        texts.map(|batch| batch.rows.len())
    }

    /// Takes the newest rows of text out.
    pub(super) fn take_text(&mut self) -> Option<Vec<Kept>> {
        let newest = self.batches.iter().rposition(|batch| batch.is_text)?;
        self.batches.remove(newest).map(|batch| batch.rows)
    }

    /// Takes the visual rows at these positions out; by position.
    pub(super) fn take_vision(&mut self, wanted: impl Fn(Pos) -> bool) -> Vec<Kept> {
        let mut taken = Vec::new();
        for batch in self.batches.iter_mut().filter(|batch| !batch.is_text) {
            let (out, stay) = batch.rows.iter().partition(|row| wanted(row.pos));
            batch.rows = stay;
            taken.extend::<Vec<Kept>>(out);
        }
        self.batches.retain(|batch| !batch.rows.is_empty());
        taken.sort_unstable_by_key(|row| row.pos);
        taken
    }

    /// Puts text back that was taken out and not used.
    pub(super) fn put_back(&mut self, rows: Vec<Kept>) {
        self.batches.push_back(Batch {
            is_text: true,
            rows,
        });
    }

    /// Rows that are copied at once.
    pub(super) fn rows_a_piece(&self) -> usize {
        (PIECE / self.row_bytes.max(1)).max(1)
    }

    /// Reads rows that were taken out into `out` and gives their slots up. False: they are lost, and
    /// [`RowStore::trouble`] says why.
    pub(super) fn give(&mut self, rows: &[Kept], out: &mut Vec<u8>) -> bool {
        let start = Instant::now();
        let read = self.read(rows, out);
        self.release(rows);
        self.traffic.time += start.elapsed();
        match read {
            Ok(()) => {
                self.traffic.rows_back += rows.len() as u64;
                true
            }
            Err(error) => {
                self.traffic.rows_dropped += rows.len() as u64;
                self.trouble = Some(error.to_string());
                false
            }
        }
    }

    /// Drops rows of tokens from this position on: they were taken back.
    pub(super) fn truncate(&mut self, from: Pos) {
        let mut gone = Vec::new();
        for batch in &mut self.batches {
            let (stay, go): (Vec<Kept>, Vec<Kept>) =
                batch.rows.iter().partition(|row| row.pos < from);
            batch.rows = stay;
            gone.extend(go);
        }
        self.batches.retain(|batch| !batch.rows.is_empty());
        self.release(&gone);
    }

    pub(super) fn clear(&mut self) {
        *self = RowStore::new(self.options);
    }

    /// Whether the engine saves rows, and how large they are.
    fn learn_row_bytes(&mut self, engine: &mut dyn Engine, cell: Cell) -> Result<bool> {
        if self.row_bytes == 0 {
            let mut row = Vec::new();
            engine.save_rows(&[cell], &mut row)?;
            self.row_bytes = row.len();
        }
        Ok(self.row_bytes > 0)
    }

    /// Drops so many rows, of the oldest batches first, and of one batch those with the least
    /// attention.
    fn make_room(&mut self, mut rows: usize) {
        while rows > 0
            && let Some(mut oldest) = self.batches.pop_front()
        {
            let stay = oldest.rows.len().saturating_sub(rows);
            let mut ranked = oldest.rows.clone();
            most_asked(&mut ranked, stay, |row| row.asked);
            let stays: HashSet<Pos> = ranked.iter().map(|row| row.pos).collect();
            let (stay, go): (Vec<Kept>, Vec<Kept>) =
                oldest.rows.iter().partition(|row| stays.contains(&row.pos));
            rows -= go.len();
            self.traffic.rows_dropped += go.len() as u64;
            self.release(&go);
            if !stay.is_empty() {
                oldest.rows = stay;
                self.batches.push_front(oldest);
            }
        }
    }

    fn take_slots(&mut self, n: usize) -> Vec<u64> {
        let mut slots = Vec::with_capacity(n);
        while slots.len() < n {
            slots.push(self.free.pop_first().unwrap_or_else(|| {
                self.slots += 1;
                self.slots - 1
            }));
        }
        slots
    }

    fn release(&mut self, rows: &[Kept]) {
        self.free.extend(rows.iter().map(|row| row.slot));
        if self.free.len() as u64 == self.slots {
            self.free.clear();
            self.slots = 0;
            self.place.empty();
        }
    }

    /// Makes room for all slots.
    fn reserve(&mut self) -> io::Result<()> {
        self.place.make(self.options.store)?;
        self.place.reserve(self.slots * self.row_bytes as u64)
    }

    fn write(&mut self, rows: &[Kept], bytes: &[u8]) -> io::Result<()> {
        for (range, slot) in runs(rows) {
            let bytes = &bytes[range.start * self.row_bytes..range.end * self.row_bytes];
            self.place.write(slot * self.row_bytes as u64, bytes)?;
        }
        Ok(())
    }

    fn read(&self, rows: &[Kept], out: &mut Vec<u8>) -> io::Result<()> {
        out.clear();
        out.resize(rows.len() * self.row_bytes, 0);
        for (range, slot) in runs(rows) {
            let bytes = &mut out[range.start * self.row_bytes..range.end * self.row_bytes];
            self.place.read(slot * self.row_bytes as u64, bytes)?;
        }
        Ok(())
    }
}

/// Keeps `n` of them, those that were asked for most; their order is any.
fn most_asked<T>(rows: &mut Vec<T>, n: usize, asked: impl Fn(&T) -> f32) {
    if n < rows.len() {
        rows.sort_by(|a, b| asked(b).total_cmp(&asked(a)));
        rows.truncate(n);
    }
}

/// Rows whose slots follow one another: which they are, and the first slot.
fn runs(rows: &[Kept]) -> impl Iterator<Item = (std::ops::Range<usize>, u64)> + '_ {
    let mut from = 0;
    let runs = rows.chunk_by(|a, b| a.slot + 1 == b.slot);
    runs.map(move |run| {
        let range = from..from + run.len();
        from = range.end;
        (range, run[0].slot)
    })
}

/// What the slots lie in.
#[derive(Debug)]
enum Place {
    None,
    File(File),
    Ram(Vec<u8>),
}

impl Place {
    fn make(&mut self, store: BinStore) -> io::Result<()> {
        if let Place::None = self {
            *self = match store {
                BinStore::File => Place::File(nameless()?),
                BinStore::Ram | BinStore::Off => Place::Ram(Vec::new()),
            };
        }
        Ok(())
    }

    /// Main memory for so many bytes in all; a disk says with each write whether it has room.
    fn reserve(&mut self, bytes: u64) -> io::Result<()> {
        if let Place::Ram(all) = self {
            let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
            let more = bytes.saturating_sub(all.len());
            all.try_reserve_exact(more).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Place::None => Err(io::ErrorKind::NotFound.into()),
            Place::File(file) => {
                file.seek(SeekFrom::Start(at))?;
                file.write_all(bytes)
            }
            Place::Ram(all) => {
                let at = usize::try_from(at).map_err(io::Error::other)?;
                let end = at + bytes.len();
                if all.len() < end {
                    all.resize(end, 0);
                }
                all[at..end].copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        match self {
            Place::None => Err(io::ErrorKind::UnexpectedEof.into()),
            Place::File(file) => {
                let mut file = file;
                file.seek(SeekFrom::Start(at))?;
                file.read_exact(out)
            }
            Place::Ram(all) => {
                let at = usize::try_from(at).map_err(io::Error::other)?;
                let rows = all.get(at..at + out.len());
                out.copy_from_slice(rows.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }

    /// Gives back what it takes. A file that cannot be cut is made anew when there are rows.
    fn empty(&mut self) {
        *self = Place::None;
    }
}

/// A file that no folder lists: it is gone when the process is, however that ends.
fn nameless() -> io::Result<File> {
    let folder = folder();
    tempfile::tempfile_in(&folder).map_err(|e| {
        let (folder, text) = (folder.display().to_string(), e.to_string());
        match text.contains(&folder) {
            true => e,
            false => io::Error::new(e.kind(), format!("{folder}: {text}")),
        }
    })
}

/// Where temporary files lie on a disk: `/tmp` may lie in main memory, `/var/tmp` does not.
fn folder() -> PathBuf {
    let on_disk = PathBuf::from("/var/tmp");
    match std::env::var_os("TMPDIR") {
        Some(chosen) if !chosen.is_empty() => PathBuf::from(chosen),
        _ if on_disk.is_dir() => on_disk,
        _ => std::env::temp_dir(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::scripted::Scripted;
    use crate::engine::{Batch, Input, Observation};

    fn saved(pos: &[Pos], row_bytes: usize) -> Saved {
        let row = |&pos: &Pos| (0..row_bytes).map(move |i| (pos as u8).wrapping_add(i as u8));
        Saved {
            pos: pos.to_vec(),
            rows: pos.iter().flat_map(row).collect(),
        }
    }

    #[test]
    fn rows_are_those_of_tokens_that_left() {
        let rows = |pos: &[Pos], bytes: usize| Saved {
            pos: pos.to_vec(),
            rows: vec![0; bytes],
        };
        let held = || HashSet::from([0, 1, 9]);
        check(&[rows(&[2, 3], 8), rows(&[4], 4)], 10, held()).unwrap();
        for bad in [
            rows(&[2, 2], 8),
            rows(&[1], 4),
            rows(&[10], 4),
            rows(&[-1], 4),
            rows(&[2, 3], 7),
            rows(&[2], 0),
            rows(&[], 4),
        ] {
            assert!(
                check(std::slice::from_ref(&bad), 10, held()).is_err(),
                "{bad:?}"
            );
        }
        assert!(check(&[rows(&[2], 4), rows(&[2], 4)], 10, held()).is_err());
        assert!(check(&[rows(&[2], 4), rows(&[3], 8)], 10, held()).is_err());
    }

    proptest! {
        /// Batches come and go in any order, and each row is read as it was written.
        #[test]
        fn rows_come_out_as_they_went_in(
            steps in prop::collection::vec((any::<bool>(), 1..30usize), 1..40),
            file in any::<bool>(),
            max_rows in 1..80u64,
        ) {
            const ROW: usize = 24;
            let store = if file { BinStore::File } else { BinStore::Ram };
            let options = BinOptions { store, max_bytes: max_rows * ROW as u64 };
            let mut store = RowStore::new(options);
            let mut next = 0;
            for (puts, n) in steps {
                if puts {
                    let pos: Vec<Pos> = (next..).take(n).collect();
                    next += n as Pos;
                    store.push(&saved(&pos, ROW));
                } else if let Some(rows) = store.take_text() {
                    let pos: Vec<Pos> = rows.iter().map(|row| row.pos).collect();
                    let mut bytes = Vec::new();
                    prop_assert!(store.give(&rows, &mut bytes));
                    prop_assert_eq!(bytes, saved(&pos, ROW).rows);
                }
                prop_assert!(store.bytes() <= options.max_bytes);
                prop_assert!(store.bytes_in_ram() <= options.max_bytes);
                let mut pos: Vec<Pos> = store.positions().collect();
                let n = pos.len();
                pos.sort_unstable();
                pos.dedup();
                prop_assert_eq!(pos.len(), n);
                for (batch, texts) in store.batches.iter().zip(store.texts().unwrap()) {
                    let pos: Vec<Pos> = batch.rows.iter().map(|row| row.pos).collect();
                    prop_assert_eq!(texts.rows, saved(&pos, ROW).rows);
                }
            }
            prop_assert_eq!(store.trouble(), None);
        }
    }

    /// An engine that holds the positions 0 to `n`, each in its cell.
    fn engine(n: usize) -> Scripted {
        let mut engine = Scripted::new(n, 7).patched();
        let pos: Vec<Pos> = (0..).take(n).collect();
        for pos in pos.chunks(7) {
            let tokens = vec![1; pos.len()];
            let batch = Batch::new(Input::Tokens(&tokens), pos);
            engine
                .decode(batch, &mut Vec::new(), &mut Observation::default())
                .unwrap();
        }
        engine
    }

    /// The oldest go first, and of those that left at once what was looked at least.
    #[test]
    fn what_was_looked_at_least_makes_room() {
        let mut engine = engine(30);
        let mut store = RowStore::new(BinOptions::ram(10 * 4));
        let mut leave = |store: &mut RowStore, cells: std::ops::Range<Cell>, asked: &[f32]| {
            let leaving = cells.zip(asked).map(|(cell, &asked)| Leaving {
                cell,
                pos: cell as Pos,
                asked,
            });
            store.keep(&mut engine, leaving.collect(), false).unwrap();
        };
        leave(&mut store, 0..4, &[0.4, 0.1, 0.3, 0.2]);
        leave(&mut store, 4..10, &[0.0; 6]);
        assert_eq!(store.rows(), 10);
        leave(&mut store, 10..12, &[0.0; 2]);
        let pos = |store: &RowStore| store.positions().collect::<Vec<Pos>>();
        assert_eq!(pos(&store), [0, 2, 4, 5, 6, 7, 8, 9, 10, 11]);
        // More at once than there is room for: the best of them.
        let asked: Vec<f32> = (0..12).map(|i| i as f32).collect();
        leave(&mut store, 12..24, &asked);
        assert_eq!(pos(&store), (14..24).collect::<Vec<Pos>>());
        let by_pos: HashMap<Pos, u64> = store.batches[0]
            .rows
            .iter()
            .map(|row| (row.pos, row.slot))
            .collect();
        assert_eq!(by_pos.len(), 10);
        assert!(by_pos.values().all(|&slot| slot < 12));
        assert_eq!(store.traffic().rows_dropped, 2 + 2 + 10);
        assert_eq!(store.trouble(), None);
    }
}
