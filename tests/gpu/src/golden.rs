//! Compares whole models on the GPU with the golden files of Transformers + PEFT, as the CPU tests
//! do.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lora_model::{Base, Gradients, PassOptions, PeftAdapter, forward_backward, logits};
use lora_ops::transfer::to_vec;
use lora_spec::{ActivationCheckpointing, BaseDtype, Document, MicroBatch};
use serde_json::Value;

use crate::check::{Check, TestBench, error, values};

/// Tolerances of f32 on a GPU: cuBLAS and the kernels sum in another order than the CPU.
const LOGITS_TOLERANCE: f64 = 2e-5;
const GRADIENTS_TOLERANCE: f64 = 1e-4;

/// Largest ratio of a bf16 model's error to the error of PEFT's own run under autocast, both
/// against f64. It applies to the logits, the loss, and the largest and the median error of the
/// gradients. The error of a single gradient is random.
const PEFT_ERROR_FACTOR: f64 = 1.5;

/// One check for each golden case.
pub(crate) fn checks(golden: &Path) -> Result<Vec<Check>> {
    let cases = golden.join("cases");
    let entries =
        std::fs::read_dir(&cases).with_context(|| format!("the golden values in {}", cases.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let check = |name: String| {
        let golden = golden.to_owned();
        Check::new(format!("golden {name}"), move |bench| case(bench, &golden, &name))
    };
    Ok(names.into_iter().map(check).collect())
}

fn case(bench: &TestBench, golden: &Path, name: &str) -> Result<String> {
    let dir = golden.join("cases").join(name);
    let json = |file: &str| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(dir.join(file))?)?) };
    let load = |file: &str| candle_core::safetensors::load(dir.join(file), &Device::Cpu);
    let (case, errors) = (json("case.json")?, json("errors.json")?);
    let model = case["model"].as_str().context("case.json has no field `model`")?;
    let base = Base::load(&golden.join("models").join(model).into(), BaseDtype::Auto, &bench.device)?;
    let adapter =
        PeftAdapter::read(&dir.join("adapter").into())?.to_adapter(&base.config)?.to_device_of(&base)?;
    let (inputs, expected) = (load("inputs.safetensors")?, load("expected.safetensors")?);
    let (rows, seq) = inputs["tokens"].dims2()?;
    let (tokens, labels) = (values(&inputs["tokens"])?, values(&inputs["labels"])?);
    let real = values(&inputs["attention_mask"])?;
    // Labels are not shifted: position t predicts label t + 1.
    let next = |i: usize| if i % seq + 1 < seq { labels[i + 1] } else { -100.0 };
    let batch = MicroBatch {
        rows: Document::whole_rows(vec![0; rows], seq),
        seq_len: seq,
        tokens: tokens.iter().map(|t| *t as u32).collect(),
        targets: (0..rows * seq).map(|i| next(i).max(0.0) as u32).collect(),
        weights: (0..rows * seq).map(|i| if next(i) >= 0.0 { 1.0 } else { 0.0 }).collect(),
    };
    let of_peft = &errors["peft_autocast"];
    let bounds = |what: &str, f32_bound: f64| match base.activation_dtype() {
        DType::BF16 => of_peft[what].as_f64().map(|e| e * PEFT_ERROR_FACTOR).context("errors.json"),
        _ => Ok(f32_bound),
    };
    let mut measured = Vec::new();
    let mut check_error = |what: &str, got: &[f64], want: &[f64], most: f64| -> Result<()> {
        let error = error(got, want).with_context(|| what.to_owned())?;
        ensure!(error <= most, "{what} is off by {error:.1e}, more than {most:.1e}");
        measured.push((what.to_owned(), error));
        Ok(())
    };
    let vocab = base.config.vocab_size;
    let visible = |all: Vec<f64>| -> Vec<f64> {
        all.chunks(vocab)
            .zip(&real)
            .filter(|(_, real)| **real > 0.0)
            .flat_map(|(row, _)| row.to_vec())
            .collect()
    };
    for (adapter, what) in [(Some(&adapter), "logits"), (None, "base_logits")] {
        let got = visible(values(&logits(&base, adapter, &batch)?)?);
        check_error(what, &got, &visible(values(&expected[what])?), bounds(what, LOGITS_TOLERANCE)?)?;
    }
    let mut bits: Option<Vec<u32>> = None;
    for checkpointing in [
        ActivationCheckpointing::None,
        ActivationCheckpointing::Block,
        ActivationCheckpointing::BlockSaveAttention,
    ] {
        let grads = Gradients::zeros(adapter.layout(), &bench.device)?;
        let pass = PassOptions { checkpointing, dropout: 0.0, seed: 0, step: 0 };
        let loss = forward_backward(&base, &adapter, &grads, &batch, pass)?;
        let expected_loss = values(&expected["loss_sum"])?;
        check_error("loss", &[loss.sum()?], &expected_loss, bounds("loss_sum", LOGITS_TOLERANCE)?)?;
        let flat: Vec<f32> = to_vec(grads.flat())?;
        check_gradients(&adapter, &flat, loss.weight_sum, &expected, |name, got, want| {
            check_error(name, got, want, bounds("grad_max", GRADIENTS_TOLERANCE)?)
        })?;
        let now: Vec<u32> = flat.iter().map(|g| g.to_bits()).collect();
        ensure!(*bits.get_or_insert(now.clone()) == now, "recomputed blocks gave different bits");
    }
    let gradients = measured.iter().filter(|(what, _)| what.starts_with("grad.")).map(|(_, error)| *error);
    let median_error = median(gradients);
    if base.activation_dtype() == DType::BF16 {
        let all = of_peft.as_object().context("errors.json")?.iter();
        let of_peft = median(all.filter(|(k, _)| k.starts_with("grad.")).filter_map(|(_, v)| v.as_f64()));
        let most = of_peft * PEFT_ERROR_FACTOR;
        ensure!(median_error <= most, "median gradient: {median_error:.1e}, more than {most:.1e}");
    }
    let worst = |part: &str| {
        let of_part = measured.iter().filter(|(what, _)| what.starts_with(part));
        of_part.fold(0.0_f64, |most, (_, error)| most.max(*error))
    };
    let (logits, loss, gradients) = (worst("logits"), worst("loss"), worst("grad."));
    Ok(format!("logits {logits:.1e}, loss {loss:.1e}, gradients {gradients:.1e}, median {median_error:.1e}"))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn check_gradients(
    adapter: &lora_model::Adapter,
    flat: &[f32],
    weight_sum: f64,
    expected: &HashMap<String, Tensor>,
    mut check_error: impl FnMut(&str, &[f64], &[f64]) -> Result<()>,
) -> Result<()> {
    for (tensor, _, range) in adapter.layout().tensors() {
        let name = format!("grad.{tensor}");
        let got: Vec<f64> = flat[range].iter().map(|g| f64::from(*g) / weight_sum).collect();
        ensure!(got.iter().any(|g| *g != 0.0), "{name} is zero");
        check_error(&name, &got, &values(&expected[&name])?)?;
    }
    Ok(())
}
