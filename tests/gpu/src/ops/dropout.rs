//! Dropout, whose mask must have the CPU's bits.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use lora_ops::Ids;
use lora_ops::dropout::Dropout;

use crate::check::{Check, DTYPES, TestBench, compare, shifted, values};

const SHAPES: [[usize; 2]; 6] = [[1, 1], [3, 7], [40, 64], [9, 83], [33, 576], [2, 5003]];
const PROBABILITY: f64 = 0.3;

pub(crate) fn checks() -> Vec<Check> {
    let check =
        |dtype: DType| Check::new(format!("dropout {}", dtype.as_str()), move |bench| apply(bench, dtype));
    DTYPES.map(check).into()
}

fn apply(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut dropped = (0, 0);
    for shape in SHAPES {
        let x = bench.random("x", &shape, 1.0, dtype)?;
        let tokens: Vec<u32> = (0..2 * shape[0] as u32).map(|i| i.wrapping_mul(0x9e37_79b1)).collect();
        let run = |x: &Tensor| -> Result<Tensor> {
            let tokens = Ids::new(tokens.clone(), x.device())?;
            Ok(Dropout::new(bench.seed, "model.layers.0.mlp.up_proj", 1 << 20, PROBABILITY, tokens)
                .apply(x)?)
        };
        // The CPU's f32 result, rounded to the type of the GPU's result.
        let want = bench.on_both(&run(&x.0)?, dtype)?.0;
        let got = run(&x.1)?;
        compare("y", &got, &want, 0.0)?;
        compare("y of a shifted x", &run(&shifted(&x.1)?)?, &want, 0.0)?;
        let y = values(&got)?;
        dropped = (dropped.0 + y.iter().filter(|y| **y == 0.0).count(), dropped.1 + y.len());
    }
    let share = dropped.0 as f64 / dropped.1 as f64;
    ensure!((share - PROBABILITY).abs() < 0.02, "a share of {share} is dropped instead of {PROBABILITY}");
    Ok(format!("the same mask; {share:.3} dropped"))
}
