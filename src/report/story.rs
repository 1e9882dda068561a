//! What became of every token of a conversation.

use super::told::Sentence;
use crate::attend::Attended;
use crate::cache::{Modality, Pos};
use crate::image::hd;
use crate::trace::Jpeg;

/// Where a token is at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// In the cache.
    Kept,
    /// In the cache again, after it had left.
    Back,
    /// In the recycle bin.
    Binned,
    /// Left after its prompt, or never went in.
    Pruned,
    /// Left while decoding.
    Evicted,
}

/// A token, whether it is still in the cache or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its place among all that went in.
    pub pos: Pos,
    /// Where it comes from.
    pub modality: Modality,
    /// The picture that it is a part of, by its number.
    pub image: Option<u32>,
    /// Its text, if it has any.
    pub bytes: Vec<u8>,
    /// What became of it.
    pub fate: Fate,
    /// The decoded token after which it left, from 1 on; 0: the prompt.
    pub left_at: usize,
    /// The decoded token before which it came back, from 1 on; 0: a prompt.
    pub back_at: usize,
    /// Whether it was decoded, not part of a prompt.
    pub answer: bool,
    /// Of a visual token that layers chose: by sentence, how many did, added up over steps. Sentences
    /// behind the last have 0.
    pub looked: Vec<u32>,
}

/// A picture that was shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// Its number in the conversation.
    pub image: u32,
    /// What it looks like, made smaller.
    pub jpeg: Jpeg,
    /// Where its tokens lie on it, where the model is known to cut it so.
    pub layout: Option<hd::Layout>,
}

/// The cache after a decoded token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Text tokens in it.
    pub text: usize,
    /// Visual tokens in it.
    pub vision: usize,
    /// Those of both that are in the recycle bin.
    pub binned: usize,
    /// So far.
    pub evicted: usize,
    /// So far.
    pub restored: usize,
    /// What the token's step attended to, if it looked something up. A cell counts once for each
    /// layer that chose.
    pub attended: Attended,
}

/// A conversation.
#[derive(Clone, Debug, Default)]
pub struct Story {
    /// By position.
    pub tokens: Vec<Token>,
    /// In the order in which they were shown.
    pub images: Vec<Image>,
    /// The first moment is that after the first prompt.
    pub moments: Vec<Moment>,
    /// How often the recycle bin was emptied.
    pub flushes: usize,
    /// The most cells at once, the prompt included.
    pub peak: usize,
    /// The most cells at once after a prompt was pruned.
    pub peak_decoding: usize,
    /// The first sentences of its answers, where anything was looked up.
    pub sentences: Vec<Sentence>,
    /// Sentences behind these.
    pub sentences_left_out: usize,
}

impl Story {
    /// What became of each token of a picture, in the order of its rows.
    pub fn picture(&self, image: u32) -> Vec<&Token> {
        let own = |token: &&Token| token.image == Some(image);
        self.tokens.iter().filter(own).collect()
    }

    /// Tokens of a modality that one of these things became of.
    pub fn count(&self, modality: Modality, fates: &[Fate]) -> usize {
        let own = |token: &&Token| token.modality == modality && fates.contains(&token.fate);
        self.tokens.iter().filter(own).count()
    }
}
