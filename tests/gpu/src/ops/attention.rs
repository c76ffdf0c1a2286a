//! Attention over whole sequences, windows and documents, with new queries and cached keys, and its
//! memory.

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Tensor};
use lora_ops::Ids;
use lora_ops::attention::{AttentionShape, backward, first_visible_keys, forward};
use lora_ops::device::{MemoryUsage, memory};
use lora_ops::transfer::zeros;

use crate::check::{Check, DTYPES, TestBench, compare, repeats, tolerance, values};

/// The earlier keys that a query can see.
#[derive(Debug, Clone, Copy)]
enum VisibleKeys {
    All,
    Window(usize),
    /// Documents of this length; the last one is shorter.
    Documents(usize),
    /// Windows of the first length in documents of the second.
    Both(usize, usize),
}

impl VisibleKeys {
    fn first(self, shape: AttentionShape) -> Option<Vec<u32>> {
        let AttentionShape { batch, seq, kv_seq, .. } = shape;
        let segments =
            |length: usize| (0..batch * kv_seq).map(|i| (i % kv_seq / length) as u32).collect::<Vec<_>>();
        let first = match self {
            Self::All => return None,
            Self::Window(window) => first_visible_keys(batch, kv_seq, Some(window), None),
            Self::Documents(length) => first_visible_keys(batch, kv_seq, None, Some(&segments(length))),
            Self::Both(window, length) => {
                first_visible_keys(batch, kv_seq, Some(window), Some(&segments(length)))
            }
        };
        // The queries are the last positions of each sequence.
        Some(first.chunks(kv_seq).flat_map(|first| &first[kv_seq - seq..]).copied().collect())
    }
}

struct Case {
    shape: AttentionShape,
    visible_keys: VisibleKeys,
}

fn case(
    batch: usize,
    seq: usize,
    (heads, kv_heads): (usize, usize),
    head_dim: usize,
    visible_keys: VisibleKeys,
) -> Case {
    Case { shape: AttentionShape::new(batch, seq, heads, kv_heads, head_dim), visible_keys }
}

/// Cases with every head width that has its own kernels and with some widths between, with full and
/// partial tiles.
fn cases() -> Vec<Case> {
    vec![
        case(1, 1, (1, 1), 1, VisibleKeys::All),
        case(2, 5, (2, 1), 3, VisibleKeys::All),
        case(3, 70, (4, 2), 6, VisibleKeys::Window(9)),
        case(2, 131, (2, 2), 16, VisibleKeys::Documents(50)),
        case(2, 1, (2, 1), 64, VisibleKeys::All),
        case(1, 300, (3, 1), 64, VisibleKeys::All),
        case(2, 128, (2, 1), 64, VisibleKeys::Window(40)),
        case(1, 150, (2, 2), 32, VisibleKeys::Both(30, 70)),
        case(1, 70, (2, 1), 80, VisibleKeys::Documents(33)),
        case(1, 67, (2, 2), 96, VisibleKeys::Window(1)),
        case(2, 129, (2, 1), 128, VisibleKeys::All),
        case(1, 200, (2, 1), 128, VisibleKeys::Both(60, 90)),
        case(1, 40, (1, 1), 130, VisibleKeys::All),
        case(1, 70, (2, 1), 256, VisibleKeys::Window(50)),
        // Groups of 1, 2, 4 and 7 query heads; an odd and an even number of tiles, the last one not
        // full; windows shorter than a tile; documents that end within one.
        case(2, 260, (14, 2), 16, VisibleKeys::All),
        case(1, 200, (28, 4), 8, VisibleKeys::Documents(150)),
        case(2, 260, (4, 1), 128, VisibleKeys::Window(20)),
        case(1, 400, (2, 2), 128, VisibleKeys::All),
        case(2, 200, (4, 2), 96, VisibleKeys::Both(25, 130)),
        case(2, 140, (4, 1), 256, VisibleKeys::Documents(90)),
        case(1, 250, (7, 1), 256, VisibleKeys::All),
        capped(case(2, 131, (2, 1), 16, VisibleKeys::Window(50))),
        capped(case(1, 130, (4, 2), 128, VisibleKeys::All)),
        capped(case(1, 70, (2, 1), 256, VisibleKeys::Documents(40))),
        case(1, 40, (2, 1), 300, VisibleKeys::All),
        case(1, 70, (4, 2), 512, VisibleKeys::Window(37)),
        case(2, 35, (2, 2), 512, VisibleKeys::Documents(20)),
        capped(case(1, 50, (4, 1), 512, VisibleKeys::All)),
    ]
}

/// The case with a bound that some of its scores exceed.
fn capped(case: Case) -> Case {
    Case { shape: AttentionShape { softcap: Some(1.5), ..case.shape }, ..case }
}

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in DTYPES {
        let name = |what: &str| format!("attention {what} {}", dtype.as_str());
        checks.push(Check::new(name("forward and backward"), move |bench| training(bench, dtype)));
        checks.push(Check::new(name("of new queries"), move |bench| decoding(bench, dtype)));
        checks.push(Check::new(name("backward memory"), move |bench| backward_memory(bench, dtype)));
    }
    checks
}

/// An operand on the CPU and on the GPU.
type CpuAndGpu = (Tensor, Tensor);

fn inputs(bench: &TestBench, shape: AttentionShape, dtype: DType) -> Result<[CpuAndGpu; 3]> {
    let AttentionShape { batch, seq, kv_seq, heads, kv_heads, head_dim, .. } = shape;
    let keys = [batch * kv_seq, kv_heads * head_dim];
    Ok([
        bench.random("q", &[batch * seq, heads * head_dim], 2.0, dtype)?,
        bench.random("k", &keys, 2.0, dtype)?,
        bench.random("v", &keys, 1.0, dtype)?,
    ])
}

/// Returns the output and the gradients of queries, keys and values.
fn run(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    d_output: &Tensor,
    shape: AttentionShape,
    first: Option<&[u32]>,
) -> Result<Vec<Tensor>> {
    let first = first.map(|first| Ids::new(first, q.device())).transpose()?;
    let (output, saved) = forward(q, k, v, shape, first.as_ref())?;
    let (dq, dk, dv) = backward(&saved, (q, k, v), &output, d_output, shape, first.as_ref())?;
    Ok(vec![output, dq, dk, dv])
}

fn training(bench: &TestBench, dtype: DType) -> Result<String> {
    for Case { shape, visible_keys } in cases() {
        let [q, k, v] = inputs(bench, shape, dtype)?;
        let d_output = bench.random("d_output", q.0.dims(), 1.0, dtype)?;
        let first = visible_keys.first(shape);
        let want = run((&q.0, &k.0, &v.0), &d_output.0, shape, first.as_deref())?;
        let got = repeats(|| run((&q.1, &k.1, &v.1), &d_output.1, shape, first.as_deref()))?;
        // A query that sees one key gives it all the weight, whatever the score. The gradients of
        // queries and keys are then 0 except for rounding errors.
        let alone = shape.seq == 1 || matches!(visible_keys, VisibleKeys::Window(1));
        for (name, (got, want)) in ["output", "dq", "dk", "dv"].into_iter().zip(got.iter().zip(&want)) {
            let what = format!("{name} of {shape:?} that sees {visible_keys:?}");
            if alone && (name == "dq" || name == "dk") {
                let largest = values(got)?.into_iter().fold(0.0_f64, |most, v| most.max(v.abs()));
                ensure!(largest <= tolerance(dtype), "{what}: {largest:.1e} instead of 0");
            } else {
                compare(&what, got, want, tolerance(dtype))?;
            }
        }
    }
    Ok(format!("{} shapes", cases().len()))
}

fn decoding(bench: &TestBench, dtype: DType) -> Result<String> {
    let cases = [
        (1, 1, 8, VisibleKeys::All),
        (1, 200, 64, VisibleKeys::All),
        (7, 150, 64, VisibleKeys::Window(30)),
        (66, 130, 128, VisibleKeys::All),
        (3, 75, 20, VisibleKeys::Documents(50)),
        (20, 75, 512, VisibleKeys::Window(40)),
    ];
    for (seq, kv_seq, head_dim, visible_keys) in cases {
        let shape = AttentionShape { kv_seq, scale: 0.2, ..AttentionShape::new(2, seq, 4, 2, head_dim) };
        let [q, k, v] = inputs(bench, shape, dtype)?;
        let first = visible_keys.first(shape);
        let run = |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<Tensor> {
            let first = first.as_deref().map(|first| Ids::new(first, q.device())).transpose()?;
            Ok(forward(q, k, v, shape, first.as_ref())?.0)
        };
        let want = run(&q.0, &k.0, &v.0)?;
        let got = repeats(|| Ok(vec![run(&q.1, &k.1, &v.1)?]))?;
        compare(
            &format!("output of {shape:?} that sees {visible_keys:?}"),
            &got[0],
            &want,
            tolerance(dtype),
        )?;
    }
    Ok(format!("{} shapes", cases.len()))
}

/// Checks that the backward pass uses no more memory, in addition to its operands, than
/// `lora_spec`'s plan counts.
fn backward_memory(bench: &TestBench, dtype: DType) -> Result<String> {
    // The pool rounds up the sizes of at most 16 tensors.
    let rounded = 16 * crate::memory::pool_granularity(bench)? as usize;
    let mut measured = Vec::new();
    for (heads, kv_heads) in [(8, 8), (8, 2), (7, 1)] {
        let shape = AttentionShape::new(2, 130, heads, kv_heads, 64);
        let [(_, q), (_, k), (_, v)] = inputs(bench, shape, dtype)?;
        let (output, saved) = forward(&q, &k, &v, shape, None)?;
        let now = || -> Result<MemoryUsage> {
            bench.device.synchronize()?;
            memory(&bench.device)?.context("the GPU's memory cannot be read")
        };
        // Fill the memory up to its peak, so that the backward pass raises the peak.
        let before = now()?;
        let rest = (before.peak_bytes - before.used_bytes).max(1) as usize;
        let _ballast = zeros(rest, DType::U8, &bench.device)?;
        let before = now()?;
        drop(backward(&saved, (&q, &k, &v), &output, &output, shape, None)?);
        let after = now()?;
        ensure!(after.used_bytes == before.used_bytes, "{shape:?}: {before:?}, then {after:?}");
        let used = (after.peak_bytes - before.peak_bytes) as usize;
        let width = dtype.size_in_bytes();
        let gradients = (q.elem_count() + 2 * k.elem_count()) * width;
        // With tensor cores each query head has its own partial gradients of keys and values, in
        // f32.
        let is_partial = dtype == DType::BF16 && heads != kv_heads;
        let partial = if is_partial { 2 * size_of::<f32>() * q.elem_count() } else { 0 };
        // Four f32 values for each query and head.
        let rows = 16 * q.elem_count() / shape.head_dim;
        let most = gradients + partial + rows;
        ensure!(0 < used && used <= most + rounded, "{shape:?}: {used} bytes instead of {most}");
        measured.push(format!("{heads}/{kv_heads}: {used} bytes"));
    }
    Ok(measured.join(", "))
}
