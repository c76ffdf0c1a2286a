//! Token embedding, which must be exact.

use anyhow::{Result, ensure};
use candle_core::DType;
use lora_ops::{Ids, embedding};

use crate::check::{Check, DTYPES, TestBench, compare, shifted};

/// Vocabulary size, features, number of tokens.
const SHAPES: [[usize; 3]; 5] = [[1, 1, 1], [5, 7, 40], [100, 64, 33], [31, 83, 9], [11, 2056, 30]];

pub(crate) fn checks() -> Vec<Check> {
    let check = |dtype: DType| {
        Check::new(format!("embedding {}", dtype.as_str()), move |bench| forward(bench, dtype))
    };
    DTYPES.map(check).into()
}

fn forward(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for [vocab, features, tokens] in SHAPES {
        let weight = bench.random("weight", &[vocab, features], 1.0, dtype)?;
        let tokens: Vec<u32> = (0..tokens).map(|i| ((i * 7919 + 3) % vocab) as u32).collect();
        let on_gpu = Ids::new(tokens.clone(), &bench.device)?;
        let got = embedding::forward(&weight.1, &on_gpu)?;
        ensure!(got.dtype() == dtype, "rows of a {dtype:?} weight are {:?}", got.dtype());
        let want = embedding::forward(&weight.0, &Ids::new(tokens, weight.0.device())?)?;
        detail = compare("rows", &got, &want, 0.0)?;
        compare("rows of a shifted weight", &embedding::forward(&shifted(&weight.1)?, &on_gpu)?, &want, 0.0)?;
    }
    Ok(detail)
}
