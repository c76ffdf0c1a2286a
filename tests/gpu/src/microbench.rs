//! Times of the operations of a training step at the shapes of Llama-3.1-8B, as a percentage of the
//! rates that the GPU's matrix products and copies reach in the same run.
//!
//! The operations are the public ones of `lora_ops`, as training calls them. Before each timed run
//! a large matrix is read, so that no operand is in the GPU's cache.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use candle_core::{DType, Tensor};
use lora_ops::DeviceTimestamp;
use lora_ops::ceilings::Ceilings;
use lora_ops::gemm::{no_trans, product, trans};
use lora_ops::profile;
use lora_ops::transfer::zeros;
use serde_json::{Value, json};

use crate::Args;

mod attention;
mod elementwise;
mod head;
mod inputs;
mod optimizer;
mod products;
mod quantized;
mod row;

use inputs::BenchInputs;
use row::{BenchRow, TimedPart};

/// Number of runs of a row that are not measured.
const WARMUP: usize = 2;
/// Number of measured runs; the median is reported.
const RUNS: usize = 7;

/// Rows and columns of the bf16 matrix that is read between runs: 256 MiB, several times the cache
/// of any GPU.
const EVICTION_SHAPE: [usize; 2] = [16_384, 8192];

/// Measures the rows whose names contain `args.only`, and prints a table. With `args.json`, also
/// writes the results as JSON.
///
/// # Errors
/// A row could not be measured. The other rows are still measured.
pub(crate) fn run(args: &Args) -> Result<()> {
    let device = lora_train::open_device(args.device)?;
    let inputs = BenchInputs::new(&device, args.bench_scale.get());
    let numerics_id = lora_train::numerics_id(&device)?;
    println!("{numerics_id}");
    let ceilings = Ceilings::measure(&device, inputs.scale()).context("measuring the device's ceilings")?;
    println!(
        "ceilings: {:.1} TFLOP/s (product of {side} x {side} x {side}), {:.1} GB/s (copy of {:.0} MiB)",
        ceilings.tflop_s,
        ceilings.gb_s,
        ceilings.copy_bytes as f64 / f64::from(1 << 20),
        side = ceilings.product_side,
    );
    let evict = CacheEviction::new(&inputs)?;
    let rows = [
        products::rows(&inputs),
        quantized::rows(&inputs),
        attention::rows(&inputs),
        elementwise::rows(&inputs),
        head::rows(&inputs),
        optimizer::rows(&inputs),
    ];
    println!("{:<56}{:>10}{:>9}{:>9}{:>11}", "operation", "ms", "GB/s", "TFLOP/s", "% ceiling");
    let mut result = json!({
        "device": lora_ops::device::describe(&device)?,
        "numerics_id": numerics_id,
        "ceilings": {
            "product_side": ceilings.product_side,
            "tflop_s": ceilings.tflop_s,
            "copy_bytes": ceilings.copy_bytes,
            "gb_s": ceilings.gb_s,
        },
        "rows": [],
    });
    let (mut measured, mut failed) = (0, 0);
    for row in rows.into_iter().flatten().filter(|row| row.name.contains(&args.only)) {
        let value = match milliseconds(&row, &inputs, &evict) {
            Ok(milliseconds) => {
                measured += 1;
                line(&row, milliseconds, &ceilings)
            }
            Err(error) => {
                failed += 1;
                // The lines after the first one are a backtrace.
                let error = format!("{error:#}");
                let error = error.lines().next().unwrap_or_default();
                println!("{:<56} {error}", row.name);
                json!({"name": row.name, "error": error})
            }
        };
        if let Value::Array(rows) = &mut result["rows"] {
            rows.push(value);
        }
        // The file is written after each row, so that a stopped run leaves its results.
        if let Some(path) = &args.json {
            write(path, &result)?;
        }
    }
    if failed > 0 || measured == 0 {
        bail!("{failed} of {} rows failed", measured + failed);
    }
    Ok(())
}

fn write(path: &Path, result: &Value) -> Result<()> {
    fs::write(path, format!("{result}\n")).with_context(|| path.display().to_string())
}

/// Prints a row of the table, and returns it as JSON.
fn line(row: &BenchRow, milliseconds: f64, ceilings: &Ceilings) -> Value {
    let rate = |amount: f64| (amount > 0.0).then(|| amount / (milliseconds / 1e3));
    let (gb_s, tflop_s) = (rate(row.bytes / 1e9), rate(row.flops / 1e12));
    // The percentage is that of the nearer ceiling.
    let shares = [gb_s.map(|rate| rate / ceilings.gb_s), tflop_s.map(|rate| rate / ceilings.tflop_s)];
    let percent = 100.0 * shares.into_iter().flatten().fold(0.0, f64::max);
    let cell = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
    println!("{:<56}{milliseconds:>10.4}{:>9}{:>9}{percent:>11.1}", row.name, cell(gb_s), cell(tflop_s));
    json!({
        "name": row.name, "milliseconds": milliseconds, "gb_s": gb_s, "tflop_s": tflop_s, "percent": percent,
    })
}

/// Median time of a run in milliseconds.
fn milliseconds(row: &BenchRow, inputs: &BenchInputs, evict: &CacheEviction) -> Result<f64> {
    let device = inputs.device();
    let run = (row.make)(inputs)?;
    for _ in 0..WARMUP {
        run()?;
    }
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        evict.run()?;
        times.push(match row.timed_part {
            TimedPart::Whole => {
                let before = DeviceTimestamp::now(device)?;
                run()?;
                before.milliseconds_until(&DeviceTimestamp::now(device)?)?
            }
            TimedPart::Kernels(prefix) => {
                profile::start();
                let ran = run();
                let timings = profile::finish(device)?;
                ran?;
                let kernels = timings.iter().filter(|timing| timing.name.starts_with(prefix));
                let milliseconds: f64 = kernels.map(|timing| timing.milliseconds).sum();
                if milliseconds == 0.0 {
                    bail!("no kernel {prefix}* ran");
                }
                milliseconds
            }
        });
    }
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}

/// Evicts all operands from the GPU's cache by reading a large matrix. The matrix is not written,
/// so that no cache line has to be written back during a timed run.
struct CacheEviction {
    matrix: Tensor,
    vector: Tensor,
    sums: Tensor,
}

impl CacheEviction {
    fn new(inputs: &BenchInputs) -> Result<Self> {
        let [rows, cols] = EVICTION_SHAPE.map(|size| inputs.size(size));
        Ok(Self {
            matrix: inputs.bf16(&[rows, cols])?,
            vector: inputs.bf16(&[1, cols])?,
            sums: zeros((1, rows), DType::BF16, inputs.device())?,
        })
    }

    fn run(&self) -> Result<()> {
        Ok(product(1.0, no_trans(&self.vector), trans(&self.matrix), 0.0, &self.sums)?)
    }
}
