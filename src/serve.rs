//! Many conversations over one model, for whoever asks: a hall of slots that share a context, and the
//! HTTP interface to it.

pub mod ask;
pub mod hall;
#[cfg(feature = "serve")]
pub mod http;
