//! `tokenizer.model`: a SentencePiece `ModelProto`. Of its schema (sentencepiece_model.proto) only
//! the fields that a GGUF vocabulary needs are declared; prost skips the others.

use std::path::Path;

use prost::Message;

use super::json;
use super::piece::{Kind, Piece};
use crate::error::{Error, Result};

#[derive(Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

#[derive(Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
}

#[derive(Message)]
struct NormalizerSpec {
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
}

/// Pieces in the order of their ids.
#[derive(Debug)]
pub struct Model {
    pub pieces: Vec<Piece>,
    /// Whether text is tokenized as if a space stood before it.
    pub add_space_prefix: bool,
}

/// Reads a SentencePiece model of type BPE, the one that llama.cpp's "llama" tokenizer runs.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] if the file is not such a model.
pub fn read(path: &Path) -> Result<Model> {
    const BPE: i32 = 2;
    const UNIGRAM: i32 = 1;
    let proto = ModelProto::decode(json::read_bytes(path)?.as_slice())
        .map_err(|e| Error::file(path, format!("is not a SentencePiece model: {e}")))?;
    let model_type = proto.trainer.and_then(|t| t.model_type).unwrap_or(UNIGRAM);
    if model_type != BPE {
        return Err(Error::file(
            path,
            format!("has model type {model_type}, expected {BPE} (BPE)"),
        ));
    }
    let pieces = proto.pieces.into_iter().enumerate().map(|(id, piece)| {
        let text = piece.piece.unwrap_or_default();
        let kind = match piece.kind.unwrap_or(1) {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            other => {
                return Err(Error::file(
                    path,
                    format!("piece {id} has type {other}, expected 1 to 6"),
                ));
            }
        };
        let score = piece.score.unwrap_or(0.0);
        if !score.is_finite() || text.is_empty() || text.contains('\0') {
            return Err(Error::file(
                path,
                format!("piece {id} is empty or has no finite score"),
            ));
        }
        Ok(Piece { text, score, kind })
    });
    Ok(Model {
        pieces: pieces.collect::<Result<_>>()?,
        add_space_prefix: proto
            .normalizer
            .and_then(|n| n.add_dummy_prefix)
            .unwrap_or(true),
    })
}
