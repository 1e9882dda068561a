//! What a KV cache does with its cells, in plain Rust: the reference of the tests on the real one.
//! Written from what llama.cpp promises to its callers: holes are taken from the search head on,
//! which goes back to the first cell that a removal frees, and to the start when enough is free there.

use hae::cache::Pos;

#[derive(Clone, Debug)]
pub struct Cells {
    pub cells: Vec<Option<Pos>>,
    head: usize,
}

impl Cells {
    pub fn new(size: usize) -> Self {
        Cells {
            cells: vec![None; size],
            head: 0,
        }
    }

    pub fn used(&self) -> usize {
        self.cells.iter().flatten().count()
    }

    /// One more than the highest used cell.
    pub fn end(&self) -> usize {
        self.cells
            .iter()
            .rposition(Option::is_some)
            .map_or(0, |i| i + 1)
    }

    /// Used cells with their positions.
    pub fn entries(&self) -> impl Iterator<Item = (usize, Pos)> {
        let cells = self.cells.iter().enumerate();
        cells.filter_map(|(cell, pos)| pos.map(|pos| (cell, pos)))
    }

    pub fn newest(&self) -> Option<Pos> {
        self.cells.iter().flatten().max().copied()
    }

    /// Where these positions go; `None` if there are too few cells.
    pub fn insert(&mut self, positions: &[Pos]) -> Option<Vec<usize>> {
        let (n, size) = (positions.len(), self.cells.len());
        if n > size - self.used() {
            return None;
        }
        if self.head > self.used() + 2 * n || self.head >= size {
            self.head = 0;
        }
        let around = (self.head..size).chain(0..self.head);
        let free = around.filter(|&cell| self.cells[cell].is_none());
        let taken: Vec<usize> = free.take(n).collect();
        for (&cell, &pos) in taken.iter().zip(positions) {
            self.cells[cell] = Some(pos);
        }
        self.head = taken.last()? + 1;
        Some(taken)
    }

    /// Removes the positions of one range.
    pub fn remove(&mut self, range: std::ops::Range<Pos>) {
        let mut first = None;
        for (cell, pos) in self.cells.iter_mut().enumerate() {
            if pos.is_some_and(|pos| range.contains(&pos)) {
                *pos = None;
                first = first.or(Some(cell));
            }
        }
        if let Some(first) = first {
            self.head = self.head.min(first);
        }
    }

    /// The moves that leave no holes.
    pub fn compact(&mut self) -> Vec<(u32, u32)> {
        let used = self.used();
        let holes: Vec<usize> = (0..used).filter(|&c| self.cells[c].is_none()).collect();
        let high = (used..self.cells.len()).filter(|&c| self.cells[c].is_some());
        let moves: Vec<(usize, usize)> = high.zip(holes).collect();
        for &(from, to) in &moves {
            self.cells[to] = self.cells[from].take();
        }
        self.head = used;
        let narrow = |(from, to)| (from as u32, to as u32);
        moves.into_iter().map(narrow).collect()
    }

    /// Another number of cells, or `false` where used ones are in the way.
    pub fn resize(&mut self, size: usize) -> bool {
        if self.end() > size {
            return false;
        }
        self.cells.resize(size, None);
        if self.head > size {
            self.head = 0;
        }
        true
    }

    /// All of it read out in the order of its cells and put back.
    pub fn reload(&mut self, saved: &[Pos]) -> bool {
        self.remove(0..Pos::MAX);
        saved.is_empty() || self.insert(saved).is_some()
    }

    /// These positions into the lowest free cells, wherever the search head is.
    pub fn put(&mut self, positions: &[Pos]) -> Option<Vec<u32>> {
        let free = (0..self.cells.len()).filter(|&cell| self.cells[cell].is_none());
        let taken: Vec<usize> = free.take(positions.len()).collect();
        if taken.len() < positions.len() {
            return None;
        }
        for (&cell, &pos) in taken.iter().zip(positions) {
            self.cells[cell] = Some(pos);
        }
        Some(taken.into_iter().map(|cell| cell as u32).collect())
    }
}
