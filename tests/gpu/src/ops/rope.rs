//! Rotary embedding, which rotates in place.

use anyhow::Result;
use candle_core::{DType, Tensor};
use lora_ops::rope::RopeTable;
use lora_spec::{Rope, RopeScaling};

use crate::check::{Check, DTYPES, TestBench, compare, repeats, rounding, shifted};

/// Number of sequences, tokens of a sequence, heads, features of a head, first position.
const SHAPES: [[usize; 5]; 6] = [
    [1, 1, 1, 2, 0],
    [2, 5, 3, 10, 4],
    [3, 7, 2, 6, 0],
    [2, 33, 9, 64, 0],
    [1, 40, 4, 128, 3],
    [1, 9, 40, 128, 1],
];

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in DTYPES {
        let name = |what: &str| format!("rope {what} {}", dtype.as_str());
        checks.push(Check::new(name("forward"), move |bench| rotate(bench, dtype, true)));
        checks.push(Check::new(name("backward"), move |bench| rotate(bench, dtype, false)));
    }
    checks
}

fn rotate(bench: &TestBench, dtype: DType, forward: bool) -> Result<String> {
    let mut detail = String::new();
    let all = SHAPES.into_iter().map(|shape| (shape, shape[3]));
    // Of some shapes, only a part of each head is rotated: with whole vectors of 16 bytes, or not.
    let parts = [([2, 33, 9, 64, 0], 48), ([1, 40, 4, 128, 3], 6), ([1, 9, 3, 20, 1], 16)];
    let all: Vec<_> = all.chain(parts).collect();
    let layouts = [false, true].into_iter().flat_map(|layout| all.iter().map(move |shape| (*shape, layout)));
    for (([sequences, seq, heads, head_dim, first], rotary_dim), is_interleaved) in layouts {
        let scaling = RopeScaling::Linear { factor: 1.5 };
        let rope = Rope { scaling, rotary_dim, is_interleaved, ..Rope::new(10_000.0, head_dim) };
        let x = bench.random("x", &[sequences * seq, heads * head_dim], 1.0, dtype)?;
        let run = |x: Tensor| -> Result<Tensor> {
            let table = RopeTable::new(&rope, first + seq, x.device())?;
            match forward {
                true => table.forward(&x, seq, first)?,
                false => table.backward(&x, seq)?,
            }
            Ok(x)
        };
        let want = run(x.0)?;
        let got = repeats(|| Ok(vec![run(x.1.copy()?)?]))?;
        detail = compare("x", &got[0], &want, rounding(dtype))?;
        compare("x shifted", &run(shifted(&x.1)?)?, &got[0], 0.0)?;
    }
    Ok(detail)
}
