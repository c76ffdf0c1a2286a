//! Causal attention with four query heads for each key/value head.

use lora_ops::attention::{AttentionShape, backward, forward};

use super::inputs::BenchInputs;
use super::row::BenchRow;

pub(super) fn rows(inputs: &BenchInputs) -> Vec<BenchRow> {
    let mut rows = Vec::new();
    for head_dim in [128, 64] {
        for batch in [1, 2, 4] {
            let (seq, heads) = (inputs.size(2048), inputs.size(32));
            let kv_heads = heads / 4;
            let shape = AttentionShape::new(batch, seq, heads, kv_heads, head_dim);
            let (queries, keys) = ([batch * seq, heads * head_dim], [batch * seq, kv_heads * head_dim]);
            // The forward pass has two products (scores, values), in which a query sees half of the
            // keys on average. For the backward pass four products are counted.
            let pairs = (batch * seq * (seq + 1) / 2) as f64;
            let flops = 4.0 * (heads * head_dim) as f64 * pairs;
            let bytes = 2 * batch * seq * head_dim * (heads + kv_heads);
            let name =
                |what: &str| format!("attention {what} {batch}x{seq} d{head_dim} heads {heads}/{kv_heads}");
            // The forward pass reads q, k and v and writes the output.
            rows.push(
                BenchRow::new(name("forward"), 2 * bytes, move |inputs| {
                    let (q, k, v) = (inputs.bf16(&queries)?, inputs.bf16(&keys)?, inputs.bf16(&keys)?);
                    Ok(Box::new(move || Ok(forward(&q, &k, &v, shape, None).map(drop)?)))
                })
                .with_flops(flops),
            );
            // The backward pass has the same tensors and the gradient of each.
            rows.push(
                BenchRow::new(name("backward"), 4 * bytes, move |inputs| {
                    let (q, k, v) = (inputs.bf16(&queries)?, inputs.bf16(&keys)?, inputs.bf16(&keys)?);
                    let d_output = inputs.bf16(&queries)?;
                    let (output, saved) = forward(&q, &k, &v, shape, None)?;
                    Ok(Box::new(move || {
                        Ok(backward(&saved, (&q, &k, &v), &output, &d_output, shape, None).map(drop)?)
                    }))
                })
                .with_flops(2.0 * flops),
            );
        }
    }
    rows
}
