//! Every operation compared with a plain f64 implementation, with candle-nn and with torch, and
//! with itself on 1, 2 and 3 threads.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod adamw_8bit;
mod attention;
mod candle_reference;
mod common;
mod cross_entropy;
mod dropout;
mod linear;
mod lora;
mod optimizer;
mod pointwise;
mod quant;
mod reduce;
mod threads;
mod wrong_shapes;
