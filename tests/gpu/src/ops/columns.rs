//! Columns of matrices, whose copies must be exact.

use anyhow::{Result, ensure};
use candle_core::DType;
use lora_ops::columns::{join, split};

use crate::check::{Check, DTYPES, TestBench, compare, shifted, values};

/// Rows, and three numbers of columns: whole vectors of 16 bytes, or not.
const SHAPES: [[usize; 4]; 4] = [[1, 1, 2, 3], [7, 64, 16, 16], [33, 5, 2056, 9], [130, 96, 32, 40]];

pub(crate) fn checks() -> Vec<Check> {
    let check =
        |dtype: DType| Check::new(format!("columns {}", dtype.as_str()), move |bench| copies(bench, dtype));
    DTYPES.map(check).into()
}

fn copies(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut detail = String::new();
    for [rows, a, b, c] in SHAPES {
        let x = bench.random("x", &[rows, a + b + c], 1.0, dtype)?;
        let want = split(&x.0, &[a, b, c])?;
        for x in [&x.1, &shifted(&x.1)?] {
            let got = split(x, &[a, b, c])?;
            for (got, want) in got.iter().zip(&want) {
                ensure!(got.dtype() == dtype, "columns of a {dtype:?} matrix are {:?}", got.dtype());
                detail = compare("columns", got, want, 0.0)?;
            }
            ensure!(values(&join(&got)?)? == values(x)?, "{rows} rows of {a}, {b} and {c} columns differ");
        }
    }
    Ok(detail)
}
