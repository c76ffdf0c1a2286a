//! Dequantized weights, which must have the CPU's bits.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_ops::linear::{Weight, dequantize};
use lora_ops::quant::{Codebook, FourBit, Int8, Scales, dynamic_map};
use lora_ops::transfer::to_device;
use lora_spec::{FOUR_BIT_BLOCK_SIZES, Philox};

use crate::check::{Check, DTYPES, TestBench, shifted, values};

/// Rows and columns of a weight, and the first dequantized row and the number of dequantized rows.
/// A thread block of the 4-bit kernels writes 8192 elements in bf16, 4096 in f32.
const CASES: [((usize, usize), (usize, usize)); 9] = [
    // Whole matrices: with full thread blocks, with less than one block, with an odd length.
    ((64, 512), (0, 64)),
    ((3, 8), (0, 3)),
    ((67, 401), (0, 67)),
    ((1, 1), (0, 1)),
    // Rows that start inside a block, at the start of a run and inside a run.
    ((41, 520), (1, 40)),
    ((90, 260), (1, 80)),
    // Rows that start at an odd element; odd columns, starting at the start of a run.
    ((50, 401), (3, 47)),
    ((50, 401), (8, 42)),
    // One row inside a block of 4096.
    ((9, 1000), (5, 1)),
];

pub(crate) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in DTYPES {
        let name = |what: &str| format!("dequantize {what} {}", dtype.as_str());
        checks.push(Check::new(name("nf4, fp4"), move |bench| four_bit(bench, dtype)));
        checks.push(Check::new(name("int8"), move |bench| int8(bench, dtype)));
    }
    checks
}

fn four_bit(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut compared = 0;
    for (shape, rows) in CASES {
        for block in FOUR_BIT_BLOCK_SIZES {
            for (codebook, nested) in [
                (Codebook::Nf4, None),
                (Codebook::Nf4, Some(256)),
                (Codebook::Nf4, Some(1)),
                (Codebook::Fp4, None),
                (Codebook::Fp4, Some(2)),
            ] {
                let cpu = random_four_bit(bench, shape, codebook, block, nested)?;
                let gpu = cpu.to_device(&bench.device)?;
                let (codes, scales) = (shifted(gpu.codes())?, gpu.scales().clone());
                let view = FourBit::new(shape, codebook, block, codes, scales)?;
                compared += same_bits(bench, &cpu.into(), &[gpu.into(), view.into()], rows, dtype)?;
            }
        }
    }
    Ok(format!("{compared} elements have the CPU's bits"))
}

fn int8(bench: &TestBench, dtype: DType) -> Result<String> {
    let mut compared = 0;
    for (shape, rows) in CASES {
        let codes = bytes(bench, "codes", shape.0 * shape.1)?.reshape(shape)?;
        let scales = bench.random("scales", &[shape.0], 3.0, DType::F32)?.0;
        let cpu = Int8::new(codes, scales)?;
        let gpu = cpu.to_device(&bench.device)?;
        let view = Int8::new(shifted(gpu.codes())?, gpu.scales().clone())?;
        compared += same_bits(bench, &cpu.into(), &[gpu.into(), view.into()], rows, dtype)?;
    }
    Ok(format!("{compared} elements have the CPU's bits"))
}

/// Dequantizes `count` rows from `first` on of each weight in `gpu`, to the start of an allocation
/// and to one element past a multiple of 16 bytes, and compares them with those of `cpu`. The
/// elements before and after them must not change.
fn same_bits(
    bench: &TestBench,
    cpu: &Weight,
    gpu: &[Weight],
    (first, count): (usize, usize),
    dtype: DType,
) -> Result<usize> {
    const BEFORE: f64 = 7.0;
    let want = values(&cpu.dense()?.narrow(0, first, count)?.to_dtype(dtype)?)?;
    let (len, cols) = (want.len(), cpu.dims()?.1);
    for (weight, offset) in gpu.iter().flat_map(|weight| [(weight, 0), (weight, 1)]) {
        let filled = Tensor::full(BEFORE, len + 2, &Device::Cpu)?.to_dtype(dtype)?;
        let buffer = to_device(&filled, &bench.device)?;
        dequantize(weight, first, &buffer.narrow(0, offset, len)?.reshape((count, cols))?)?;
        let all = values(&buffer)?;
        let got = &all[offset..offset + len];
        let what = format!("rows {first} to {} of {:?}, offset {offset}", first + count, weight.dims()?);
        if let Some(at) = (0..len).find(|&at| got[at].to_bits() != want[at].to_bits()) {
            anyhow::bail!("{what}: element {at} is {} instead of {}", got[at], want[at]);
        }
        let around = all[..offset].iter().chain(&all[offset + len..]);
        ensure!(around.copied().all(|value| value == BEFORE), "{what}: elements outside of the rows changed");
    }
    Ok(2 * gpu.len() * len)
}

/// Returns a weight with random codes and scales. With `nested`, the scales are quantized in blocks
/// of this size.
pub(super) fn random_four_bit(
    bench: &TestBench,
    shape: (usize, usize),
    codebook: Codebook,
    block: usize,
    nested: Option<usize>,
) -> Result<FourBit> {
    let elements = shape.0 * shape.1;
    let blocks = elements.div_ceil(block);
    let floats =
        |name: &str, len: usize| Ok::<_, anyhow::Error>(bench.random(name, &[len], 0.3, DType::F32)?.0);
    let scales = match nested {
        None => Scales::Plain(floats("absmax", blocks)?),
        Some(block) => Scales::Nested {
            codes: bytes(bench, "absmax codes", blocks)?,
            map: Tensor::new(&dynamic_map(), &Device::Cpu)?,
            absmax: floats("nested absmax", blocks.div_ceil(block))?,
            offset: 0.4,
            block,
        },
    };
    Ok(FourBit::new(shape, codebook, block, bytes(bench, "codes", elements.div_ceil(2))?, scales)?)
}

fn bytes(bench: &TestBench, name: &str, len: usize) -> Result<Tensor> {
    let philox = Philox::new(bench.seed, name);
    let words = (0..len.div_ceil(16) as u32).flat_map(|i| philox.words([i, 0, 0, 0]));
    let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).take(len).collect();
    Ok(Tensor::from_vec(bytes, len, &Device::Cpu)?)
}
