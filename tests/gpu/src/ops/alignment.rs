//! Alignment of the operands of matrix products. cuBLAS has fast kernels only for addresses and
//! leading dimensions that are multiples of 16 bytes. The simulated cuBLAS counts all other
//! products.

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Tensor};
use libloading::os::unix::{Library, Symbol};
use lora_model::{AdapterLayout, Gradients};
use lora_ops::cross_entropy::{self, Targets};
use lora_ops::gemm::{no_trans, product, trans};
use lora_ops::linear::{FrozenLinear, Weight};
use lora_ops::lora::{self, LoraPair};
use lora_ops::quant::{BLOCK_SIZE, Codebook, FourBit, Int8, NESTED_BLOCK_SIZE, Scales};
use lora_spec::{LinearModule, ModelConfig, gpu_panel_rows};

use crate::check::{Check, TestBench};

const MODELS: [(&str, &str); 3] = [
    ("Llama-3.1-8B", include_str!("../../../../benches/models/llama-3.1-8b.json")),
    ("Llama-3.2-1B", include_str!("../../../../benches/models/llama-3.2-1b.json")),
    ("Qwen2.5-7B", include_str!("../../../../benches/models/qwen2.5-7b.json")),
];

/// Tokens of a micro-batch. As a leading dimension, an odd number is unaligned.
const TOKENS: usize = 5;

/// Rank of the adapters.
const RANK: usize = 16;

pub(crate) fn checks() -> Vec<Check> {
    let check = |(name, config): (&str, &'static str)| {
        Check::new(format!("aligned products {name}"), move |bench| {
            let config = ModelConfig::parse(config).map_err(anyhow::Error::msg)?;
            let Some(counter) = Counter::of_simulator()? else {
                return Ok("skipped: only the simulated GPU counts products".into());
            };
            counter.counts_violations(bench)?;
            model(bench, &config)?;
            let (all, unaligned) = counter.since_the_last_call();
            ensure!(unaligned == 0 && all > 0, "{unaligned} of {all} products have unaligned operands");
            Ok(format!("{all} products"))
        })
    };
    MODELS.into_iter().map(check).collect()
}

/// Computes the products of a block with dense and quantized weights, of its adapters and of the
/// head.
fn model(bench: &TestBench, config: &ModelConfig) -> Result<()> {
    let mut modules = config.linear_modules();
    modules.retain(|module| module.layer < 2);
    let mut seen = Vec::new();
    for module in modules.iter().filter(|module| module.layer == 0) {
        let shape = (module.out_features, module.in_features);
        if !seen.contains(&shape) {
            seen.push(shape);
            linear(bench, module)?;
        }
    }
    adapters(bench, &AdapterLayout::new(config, &modules, RANK))?;
    let head = zeros(bench, (config.vocab_size, config.hidden_size), DType::BF16)?;
    let targets = Targets::new(&[0; TOKENS], &[1.0; TOKENS], &bench.device)?;
    let x = zeros(bench, (TOKENS, config.hidden_size), DType::BF16)?;
    cross_entropy::forward_backward(&x, &head, &targets, true)?;
    Ok(())
}

/// Computes the forward and the backward pass of a frozen layer with each format of its weight.
fn linear(bench: &TestBench, module: &LinearModule) -> Result<()> {
    let shape = (module.out_features, module.in_features);
    let bias = module.bias.then(|| Tensor::zeros(shape.0, DType::F32, &bench.device)).transpose()?;
    let run = |weight: Weight, dtype: DType| -> Result<()> {
        let layer = FrozenLinear::new(weight, bias.clone())?;
        let y = layer.forward(&zeros(bench, (TOKENS, shape.1), dtype)?)?;
        layer.backward(&y)?;
        Ok(())
    };
    run(zeros(bench, shape, DType::BF16)?.into(), DType::BF16)?;
    run(four_bit(bench, shape, false)?.into(), DType::BF16)?;
    let nested: Weight = four_bit(bench, shape, true)?.into();
    run(nested.clone(), DType::BF16)?;
    // The weight has several panels: Qwen2.5-7B's MLP in f32.
    if gpu_panel_rows(shape.0, shape.1, DType::F32.size_in_bytes()) < shape.0 {
        run(nested, DType::F32)?;
    }
    let scales = Tensor::zeros(shape.0, DType::F32, &bench.device)?;
    run(Int8::new(zeros(bench, shape, DType::U8)?, scales)?.into(), DType::BF16)
}

fn four_bit(bench: &TestBench, shape: (usize, usize), nested: bool) -> Result<FourBit> {
    let elements = shape.0 * shape.1;
    let blocks = elements.div_ceil(BLOCK_SIZE);
    let vector = |len: usize, dtype: DType| Tensor::zeros(len, dtype, &bench.device);
    let scales = match nested {
        false => Scales::Plain(vector(blocks, DType::F32)?),
        true => Scales::Nested {
            codes: vector(blocks, DType::U8)?,
            map: vector(256, DType::F32)?,
            absmax: vector(blocks.div_ceil(NESTED_BLOCK_SIZE), DType::F32)?,
            offset: 0.0,
            block: NESTED_BLOCK_SIZE,
        },
    };
    Ok(FourBit::new(shape, Codebook::Nf4, BLOCK_SIZE, vector(elements.div_ceil(2), DType::U8)?, scales)?)
}

/// Computes the forward and the backward pass of the adapters, whose matrices are views of one
/// vector.
fn adapters(bench: &TestBench, layout: &AdapterLayout) -> Result<()> {
    let parameters = zeros(bench, (1, layout.len), DType::BF16)?.flatten_all()?;
    let gradients = Gradients::zeros(layout, &bench.device)?;
    for slot in &layout.modules {
        let LinearModule { in_features, out_features, .. } = slot.module;
        let pair = |flat: &Tensor| -> Result<LoraPair> {
            let a = flat.narrow(0, slot.a.start, slot.a.len())?.reshape((slot.r, in_features))?;
            let b = flat.narrow(0, slot.b.start, slot.b.len())?.reshape((out_features, slot.r))?;
            Ok(LoraPair { a, b })
        };
        let x = zeros(bench, (TOKENS, in_features), DType::BF16)?;
        let y = zeros(bench, (TOKENS, out_features), DType::BF16)?;
        let pair_of_gradients = pair(gradients.flat())?;
        let pair = pair(&parameters)?;
        let saved = lora::forward(&x, &pair, 2.0, None, &y)?;
        lora::backward(&saved, &x, &pair, 2.0, None, &y, &pair_of_gradients, Some(&x))?;
    }
    Ok(())
}

fn zeros(bench: &TestBench, shape: (usize, usize), dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, dtype, &bench.device)?)
}

/// Number of products in the simulated cuBLAS (`tests/gpu/sim/cublas.cpp`).
struct Counter {
    all: Symbol<unsafe extern "C" fn() -> u64>,
    unaligned: Symbol<unsafe extern "C" fn() -> u64>,
    before: std::cell::Cell<(u64, u64)>,
}

impl Counter {
    /// Returns `None` if cuBLAS is not the simulated one.
    fn of_simulator() -> Result<Option<Self>> {
        let program = Library::this();
        // SAFETY: the function has this type in the simulator, and no other library has its name.
        let Ok(all) = (unsafe { program.get(b"lora_sim_products\0") }) else { return Ok(None) };
        // SAFETY: as above.
        let unaligned = unsafe { program.get(b"lora_sim_unaligned_products\0") };
        let counter =
            Self { all, unaligned: unaligned.context("the simulated cuBLAS")?, before: (0, 0).into() };
        counter.since_the_last_call();
        Ok(Some(counter))
    }

    /// Numbers of products since the last call: all, and those with an unaligned operand.
    fn since_the_last_call(&self) -> (u64, u64) {
        // SAFETY: the library is linked, and the functions read a counter.
        let now = unsafe { ((self.all)(), (self.unaligned)()) };
        let before = self.before.replace(now);
        (now.0 - before.0, now.1 - before.1)
    }

    /// Checks that a product with an unaligned operand is counted.
    fn counts_violations(&self, bench: &TestBench) -> Result<()> {
        let of_shape = |(m, n, k): (usize, usize, usize)| -> Result<(u64, u64)> {
            let [a, b] = [(m, k), (n, k)].map(|shape| zeros(bench, shape, DType::BF16));
            product(1.0, no_trans(&a?), trans(&b?), 0.0, &zeros(bench, (m, n), DType::BF16)?)?;
            Ok(self.since_the_last_call())
        };
        self.since_the_last_call();
        ensure!(of_shape((3, 8, 16))? == (1, 0), "an aligned product is not counted as one");
        for shape in [(3, 9, 16), (3, 8, 12)] {
            ensure!(of_shape(shape)? == (1, 1), "an unaligned product {shape:?} is not counted");
        }
        Ok(())
    }
}
