//! Writes the logits of a base with an adapter, for `tests/oracle/check_adapter.py` to compare with
//! PEFT's. Usage:
//!
//! `cargo run -p lora-model --example logits -- BASE_DIR ADAPTER_DIR OUT.safetensors`.

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;

use candle_core::{Device, Tensor};
use lora_model::{Base, PeftAdapter, logits};
use lora_spec::{BaseDtype, Document, MicroBatch, Philox};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, out] = arguments.as_slice() else {
        return Err("usage: logits BASE_DIR ADAPTER_DIR OUT.safetensors".into());
    };
    let base = Base::load(&Path::new(base).into(), BaseDtype::F32, &Device::Cpu)?;
    let adapter = PeftAdapter::read(&Path::new(adapter).into())?.to_adapter(&base.config)?;
    let (rows, seq_len) = (2, 24);
    let vocab = base.config.vocab_size as u64;
    let philox = Philox::new(0, "tokens");
    let tokens: Vec<u32> =
        (0..rows * seq_len).map(|i| philox.below(vocab, [i as u32, 0, 0, 0]) as u32).collect();
    let batch = MicroBatch {
        rows: Document::whole_rows(vec![0; rows], seq_len),
        seq_len,
        targets: tokens.clone(),
        weights: vec![0.0; tokens.len()],
        tokens,
    };
    let logits = logits(&base, Some(&adapter), &batch)?.reshape((rows, seq_len, base.config.vocab_size))?;
    let tokens = Tensor::from_vec(batch.tokens, (rows, seq_len), &Device::Cpu)?;
    let tensors = HashMap::from([("tokens".to_owned(), tokens), ("logits".to_owned(), logits)]);
    Ok(candle_core::safetensors::save(&tensors, out)?)
}
