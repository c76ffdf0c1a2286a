//! What a check is, and what checks compare with.

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_ops::transfer::to_device;
use lora_spec::Philox;

/// Gives what was measured, in words, or why it is wrong.
type Measure = dyn Fn(&TestBench) -> Result<String>;

/// One line of the table.
pub(crate) struct Check {
    /// What is checked, such as `rms_norm backward bf16`.
    pub(crate) name: String,
    pub(crate) run: Box<Measure>,
}

impl Check {
    pub(crate) fn new(name: impl Into<String>, run: impl Fn(&TestBench) -> Result<String> + 'static) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

/// The device under test, and where random inputs come from.
pub(crate) struct TestBench {
    /// The GPU.
    pub(crate) device: Device,
    /// Seeds the inputs: another one each time, printed.
    pub(crate) seed: u64,
}

/// The two types of activations.
pub(crate) const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

/// Largest `max|a - b| / max|b|` of an operation on a GPU against the CPU in f32: of f32, the order of sums; of bf16, some
/// roundings of inputs, results and what lies between.
pub(crate) fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 2e-2 } else { 2e-5 }
}

/// As [`tolerance`], where no more is rounded than a result that was computed in f32.
pub(crate) fn rounding(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 4e-3 } else { 2e-5 }
}

impl TestBench {
    /// A tensor of `dtype` with elements uniform in ±`scale`: on the CPU in f32 (rounded to `dtype`, so that both have the
    /// very same numbers), and on the GPU.
    pub(crate) fn random(
        &self,
        name: &str,
        shape: &[usize],
        scale: f32,
        dtype: DType,
    ) -> Result<(Tensor, Tensor)> {
        let philox = Philox::new(self.seed, name);
        let value = |i: u32| (2.0 * Philox::unit(philox.words([i, 0, 0, 0])[0]) - 1.0) * scale;
        let len: usize = shape.iter().product();
        let cpu = Tensor::from_vec((0..len as u32).map(value).collect::<Vec<f32>>(), shape, &Device::Cpu)?;
        self.on_both(&cpu, dtype)
    }

    /// An f32 CPU tensor, rounded to `dtype`, on the CPU in f32 and on the GPU in `dtype`.
    pub(crate) fn on_both(&self, cpu: &Tensor, dtype: DType) -> Result<(Tensor, Tensor)> {
        let rounded = cpu.to_dtype(dtype)?;
        Ok((rounded.to_dtype(DType::F32)?, to_device(&rounded, &self.device)?))
    }
}

/// The same elements, one element past where a tensor of its own would begin: at no address of 16-byte accesses.
pub(crate) fn shifted(x: &Tensor) -> Result<Tensor> {
    let flat = to_device(x, &Device::Cpu)?.flatten_all()?;
    let padded = to_device(&Tensor::cat(&[&flat.narrow(0, 0, 1)?, &flat], 0)?, x.device())?;
    Ok(padded.narrow(0, 1, flat.elem_count())?.reshape(x.shape())?)
}

/// The elements of a tensor on either device, in f64.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    let cpu = to_device(tensor, &Device::Cpu)?.to_dtype(DType::F64)?;
    Ok(cpu.flatten_all()?.to_vec1()?)
}

/// `max|a - b| / max|b|`.
pub(crate) fn error(got: &[f64], want: &[f64]) -> Result<f64> {
    ensure!(got.len() == want.len(), "{} elements instead of {}", got.len(), want.len());
    let largest = want.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
    let mut worst = 0.0_f64;
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        ensure!(a.is_finite(), "element {i} is {a}, not {b}");
        worst = worst.max((a - b).abs());
    }
    Ok(worst / largest.max(f64::MIN_POSITIVE))
}

/// Holds `got` from the GPU against `want` from the CPU; the error in words.
pub(crate) fn compare(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<String> {
    ensure!(got.dims() == want.dims(), "{what}: shape {:?} instead of {:?}", got.dims(), want.dims());
    let error = error(&values(got)?, &values(want)?).with_context(|| what.to_owned())?;
    ensure!(error <= tolerance, "{what} is off by {error:.1e}, more than {tolerance:.1e}");
    Ok(format!("{what} {error:.1e}"))
}

/// Runs `f` twice: the results must have the same bits.
pub(crate) fn repeats(f: impl Fn() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    let (first, second) = (f()?, f()?);
    for (a, b) in first.iter().zip(&second) {
        let bits =
            |t: &Tensor| Ok::<_, anyhow::Error>(values(t)?.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        ensure!(bits(a)? == bits(b)?, "the same input gave other bits the second time");
    }
    Ok(first)
}
