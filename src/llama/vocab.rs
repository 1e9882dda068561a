//! What of a vocabulary is no plain text: the tokens around texts, and those that only control.

use llama_cpp_sys_2 as sys;

use super::Model;
use crate::engine::{Token, Vocabulary};

/// The tokens around a text, as their text, and which of them tokenizing adds.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Around {
    /// At the start of a text; empty where there is none.
    pub bos: String,
    /// At its end; empty where there is none.
    pub eos: String,
    /// Whether [`Model::tokenize`] puts `bos` there when it may.
    pub adds_bos: bool,
    /// The same of `eos`.
    pub adds_eos: bool,
}

impl Model {
    /// The tokens around a text.
    pub fn around(&self) -> Around {
        let vocab = self.vocab();
        // SAFETY: the vocabulary lives as long as the model.
        let (bos, eos, adds_bos, adds_eos) = unsafe {
            (
                sys::llama_vocab_bos(vocab),
                sys::llama_vocab_eos(vocab),
                sys::llama_vocab_get_add_bos(vocab),
                sys::llama_vocab_get_add_eos(vocab),
            )
        };
        Around {
            bos: self.name_of(bos),
            eos: self.name_of(eos),
            adds_bos,
            adds_eos,
        }
    }

    /// Whether a token says nothing but controls: its text is its name.
    pub fn is_control(&self, token: Token) -> bool {
        // SAFETY: the vocabulary lives as long as the model, and the token is one of it.
        self.has_token(token) && unsafe { sys::llama_vocab_is_control(self.vocab(), token) }
    }

    /// A token as the vocabulary spells it, `<|end|>`; empty for one that is none.
    pub fn name_of(&self, token: Token) -> String {
        let mut out = Vec::new();
        if !self.has_token(token) || self.text(token, true, &mut out).is_err() {
            return String::new();
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Every token that ends a generation.
    pub fn ends(&self) -> Vec<Token> {
        let n = Token::try_from(self.n_vocab()).unwrap_or(Token::MAX);
        (0..n).filter(|&token| self.is_eog(token)).collect()
    }
}
