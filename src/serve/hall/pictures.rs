//! Embeddings of pictures that were shown, so that a picture is encoded once.

use std::collections::HashMap;
use std::time::Duration;

use super::units::bytes;
use crate::generate::Segment;
use crate::serve::ask::PictureStats;
use crate::turn::Content;

/// By content. Where they are too many bytes, those that were shown longest ago go.
pub(super) struct Pictures {
    kept: HashMap<Content, Kept>,
    shows: u64,
    stats: PictureStats,
}

struct Kept {
    segment: Segment,
    bytes: u64,
    shown: u64,
}

impl Pictures {
    /// None, and so many bytes of them at most.
    pub fn new(most_bytes: u64) -> Self {
        Pictures {
            kept: HashMap::new(),
            shows: 0,
            stats: PictureStats {
                most_bytes,
                ..PictureStats::default()
            },
        }
    }

    /// The embeddings of a picture that was shown before.
    pub fn get(&mut self, content: &Content) -> Option<&Segment> {
        self.shows += 1;
        let kept = self.kept.get_mut(content)?;
        kept.shown = self.shows;
        self.stats.hits += 1;
        Some(&kept.segment)
    }

    /// Keeps what took so long to encode, where there is room.
    pub fn add(&mut self, content: Content, segment: &Segment, took: Duration) {
        self.stats.misses += 1;
        self.stats.seconds += took.as_secs_f64();
        let bytes = bytes(segment);
        if bytes > self.stats.most_bytes {
            return;
        }
        self.forget(&content);
        while self.stats.bytes + bytes > self.stats.most_bytes {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.shown);
            let Some(oldest) = oldest.map(|(content, _)| *content) else {
                break;
            };
            self.forget(&oldest);
        }
        self.stats.bytes += bytes;
        self.shows += 1;
        let kept = Kept {
            segment: segment.clone(),
            bytes,
            shown: self.shows,
        };
        self.kept.insert(content, kept);
    }

    fn forget(&mut self, content: &Content) {
        if let Some(kept) = self.kept.remove(content) {
            self.stats.bytes -= kept.bytes;
        }
    }

    pub fn stats(&self) -> PictureStats {
        PictureStats {
            entries: self.kept.len(),
            ..self.stats
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(values: usize) -> Segment {
        Segment::Image {
            embeddings: vec![0.5; values],
            n: 1,
            image: 0,
            axes: None,
            separators: Vec::new(),
        }
    }

    #[test]
    fn those_shown_longest_ago_go_first() {
        let mut pictures = Pictures::new(100);
        let content = |n| ([n; 32], 0);
        let held = |pictures: &Pictures| {
            let mut all: Vec<u8> = pictures.kept.keys().map(|(hash, _)| hash[0]).collect();
            all.sort_unstable();
            all
        };
        for n in 1..=2 {
            pictures.add(content(n), &segment(10), Duration::ZERO);
        }
        assert!(pictures.get(&content(1)).is_some());
        pictures.add(content(3), &segment(10), Duration::ZERO);
        assert_eq!(held(&pictures), [1, 3]);
        // Too large to be kept at all, and as large as everything.
        pictures.add(content(4), &segment(26), Duration::ZERO);
        assert_eq!(held(&pictures), [1, 3]);
        pictures.add(content(5), &segment(25), Duration::ZERO);
        assert_eq!(held(&pictures), [5]);
        assert!(pictures.get(&content(1)).is_none());
        let stats = pictures.stats();
        assert_eq!((stats.entries, stats.bytes), (1, 100));
        assert_eq!((stats.hits, stats.misses), (1, 5));
    }
}
