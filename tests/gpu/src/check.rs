//! The type of a check, and helpers that compare tensors.

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_ops::transfer::to_device;
use lora_spec::Philox;

/// Returns a text about the measured errors, or an error if the result is wrong.
type Measure = dyn Fn(&TestBench) -> Result<String>;

/// One line of the table.
pub(crate) struct Check {
    /// Name of the check, such as `rms_norm backward bf16`.
    pub(crate) name: String,
    pub(crate) run: Box<Measure>,
}

impl Check {
    pub(crate) fn new(name: impl Into<String>, run: impl Fn(&TestBench) -> Result<String> + 'static) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

/// The device under test and the seed of the random inputs.
pub(crate) struct TestBench {
    /// The GPU.
    pub(crate) device: Device,
    /// Seed of the inputs. It is printed, and random unless `--seed` is set.
    pub(crate) seed: u64,
}

/// The two types of activations.
pub(crate) const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

/// Largest `max|a - b| / max|b|` between an operation on a GPU and on the CPU in f32. In f32 the
/// order of sums differs. In bf16 inputs, results and intermediate values are rounded.
pub(crate) fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 2e-2 } else { 2e-5 }
}

/// Like [`tolerance`], for operations that compute in f32 and round only the result.
pub(crate) fn rounding(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 4e-3 } else { 2e-5 }
}

impl TestBench {
    /// A random tensor with elements uniform in ±`scale`, on the CPU in f32 and on the GPU in
    /// `dtype`. The elements on the CPU are rounded to `dtype`, so both tensors have the same
    /// values.
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

/// Returns a copy that starts one element after the start of an allocation, so that its address is
/// not a multiple of 16 bytes.
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

/// Compares `got` from the GPU with `want` from the CPU, and returns a text with the error.
pub(crate) fn compare(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<String> {
    ensure!(got.dims() == want.dims(), "{what}: shape {:?} instead of {:?}", got.dims(), want.dims());
    let error = error(&values(got)?, &values(want)?).with_context(|| what.to_owned())?;
    ensure!(error <= tolerance, "{what} is off by {error:.1e}, more than {tolerance:.1e}");
    Ok(format!("{what} {error:.1e}"))
}

/// Runs `f` twice and returns the first result. Both results must have the same bits.
pub(crate) fn repeats(f: impl Fn() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    let (first, second) = (f()?, f()?);
    for (a, b) in first.iter().zip(&second) {
        let bits =
            |t: &Tensor| Ok::<_, anyhow::Error>(values(t)?.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        ensure!(bits(a)? == bits(b)?, "a second run with the same input gave different bits");
    }
    Ok(first)
}
