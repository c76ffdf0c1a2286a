//! The language-model head fused with its loss.

use lora_ops::cross_entropy::{Targets, forward_backward};

use super::elementwise::tokens_of;
use super::inputs::{BenchInputs, HIDDEN, TOKENS, VOCAB};
use super::row::BenchRow;

pub(super) fn rows(inputs: &BenchInputs) -> Vec<BenchRow> {
    let (tokens, hidden, vocab) = (inputs.size(TOKENS[1]), inputs.size(HIDDEN), inputs.size(VOCAB));
    // The weight is read for two products. The logits between them are not counted.
    let bytes = 2 * 2 * vocab * hidden;
    let row =
        BenchRow::new(format!("cross-entropy {tokens}x{vocab}, hidden {hidden}"), bytes, move |inputs| {
            let (x, weight) = (inputs.bf16(&[tokens, hidden])?, inputs.bf16(&[vocab, hidden])?);
            let targets = Targets::new(&tokens_of(tokens, vocab), &vec![1.0; tokens], inputs.device())?;
            Ok(Box::new(move || Ok(forward_backward(&x, &weight, &targets, true).map(drop)?)))
        });
    vec![row.with_flops(4.0 * (tokens * vocab * hidden) as f64)]
}
