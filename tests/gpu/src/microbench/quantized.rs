//! Quantized weights: dequantization alone, and whole layers.

use anyhow::Result;
use candle_core::Tensor;
use lora_ops::linear::{FrozenLinear, Weight};
use lora_ops::quant::{Codebook, FourBit, Int8};
use lora_spec::Philox;

use super::inputs::{BenchInputs, HIDDEN, INTERMEDIATE, TOKENS};
use super::row::BenchRow;

#[derive(Clone, Copy)]
enum WeightFormat {
    Nf4,
    Nf4Double,
    Int8,
}

impl WeightFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Nf4Double => "nf4-double",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of a weight with this number of elements, without code maps and the row scales of
    /// int8.
    fn bytes(self, elements: usize) -> usize {
        match self {
            Self::Nf4 => elements / 2 + 4 * elements / 64,
            Self::Nf4Double => elements / 2 + elements / 64,
            Self::Int8 => elements,
        }
    }

    fn weight(self, inputs: &BenchInputs, shape: (usize, usize)) -> Result<Weight> {
        let philox = Philox::new(0, "microbench");
        let four_bit = |nested| {
            FourBit::random(shape, Codebook::Nf4, nested, 0.02, &philox, inputs.device()).map(Weight::from)
        };
        Ok(match self {
            Self::Nf4 => four_bit(false)?,
            Self::Nf4Double => four_bit(true)?,
            Self::Int8 => Int8::random(shape, 0.02, &philox, inputs.device())?.into(),
        })
    }
}

pub(super) fn rows(inputs: &BenchInputs) -> Vec<BenchRow> {
    let tokens = inputs.size(TOKENS[1]);
    let mut rows = Vec::new();
    for format in [WeightFormat::Nf4, WeightFormat::Nf4Double, WeightFormat::Int8] {
        for (layer, in_features, out_features) in
            [("q,o", HIDDEN, HIDDEN), ("gate,up", HIDDEN, INTERMEDIATE), ("down", INTERMEDIATE, HIDDEN)]
        {
            let (from, to) = (inputs.size(in_features), inputs.size(out_features));
            let name = |what: &str| format!("{} {what} {layer}", format.name());
            let elements = from * to;
            let dequantized = BenchRow::new(
                format!("{} {to}x{from}", name("dequantize")),
                format.bytes(elements) + 2 * elements,
                move |inputs| {
                    let layer = FrozenLinear::new(format.weight(inputs, (to, from))?, None)?;
                    let x = inputs.bf16(&[8, from])?;
                    Ok(Box::new(move || Ok(layer.forward(&x).map(drop)?)))
                },
            );
            rows.push(dequantized.of_kernels("quant_"));
            let whole = |what: &str, input: usize, run: fn(&FrozenLinear, &Tensor) -> Result<()>| {
                // The dequantized bf16 weight is written and read once, in addition to the
                // operands.
                let bytes = format.bytes(elements) + 4 * elements + 2 * tokens * (from + to);
                let row = BenchRow::new(format!("{} {tokens} tokens", name(what)), bytes, move |inputs| {
                    let layer = FrozenLinear::new(format.weight(inputs, (to, from))?, None)?;
                    let input = inputs.bf16(&[tokens, input])?;
                    Ok(Box::new(move || run(&layer, &input)))
                });
                row.with_flops(2.0 * (tokens * elements) as f64)
            };
            rows.push(whole("linear forward", from, |layer, x| Ok(layer.forward(x).map(drop)?)));
            rows.push(whole("linear backward", to, |layer, dy| Ok(layer.backward(dy).map(drop)?)));
        }
    }
    rows
}
