pub mod convert;
pub mod quantize;
