//! Verification of a result against its receipt.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use lora_collective::CancelToken;
use lora_model::Base;
use lora_spec::file_names::RECEIPT;
use lora_spec::{InitLoraWeights, JobFiles, JobSpec, SourceDir, SourceFile};

use crate::device::numerics_id;
use crate::error::TrainError;
use crate::receipt::{Receipt, StepRecord};
use crate::run::Run;

/// The current paths of a job's inputs. The default of each is the path in the receipt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InputPaths {
    /// The directory of the base.
    pub base: Option<PathBuf>,
    /// The files of training rows, all or none.
    pub train: Vec<PathBuf>,
    /// The evaluation rows, for a job that has them.
    pub eval: Option<PathBuf>,
    /// The initial adapter, for a job with `adapter.init_from`.
    pub init_from: Option<PathBuf>,
}

/// The outcome of a successful verification.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Verification {
    /// Number of files whose hashes equal those in the receipt.
    pub files: usize,
    /// Number of steps that were repeated and gave the same bits.
    pub replayed_steps: u64,
    /// Number of steps of the job.
    pub steps: u64,
    /// SHA-256 of the adapter.
    pub adapter_sha256: String,
}

/// Checks the hashes of the result in `dir`, then repeats its first `steps` steps and compares
/// losses, gradient norms and the hash of parameters and moments, bit by bit. Reads base and data
/// from `input_paths`.
///
/// # Errors
/// A file cannot be read, a hash differs, the receipt is from another build or machine, or a
/// repeated step gives other bits.
pub fn verify(dir: &Path, input_paths: &InputPaths, steps: u64) -> Result<Verification, TrainError> {
    let path = dir.join(RECEIPT);
    let bytes = std::fs::read(&path).map_err(|source| TrainError::Io { name: path.clone(), source })?;
    let wrong = |message: String| TrainError::Receipt(format!("{}: {message}", path.display()));
    let receipt: Receipt = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    if receipt.format != 1 {
        return Err(wrong(format!("format {} is not supported; supported: 1", receipt.format)));
    }
    receipt.check_files(dir)?;
    let files = receipt.files().count();
    let device = Device::Cpu;
    let here = numerics_id(&device)?;
    if receipt.numerics_id != here {
        return Err(wrong(format!(
            "all {files} files are unchanged, but the steps were computed by {:?} and this is {here:?}: bits \
             are compared between equal builds and machines only",
            receipt.numerics_id
        )));
    }
    let job = &receipt.job;
    if let (None, Some(url)) = (&input_paths.base, job.model.base_url()) {
        return Err(wrong(format!("the base was {url}; download it and pass its directory with --base")));
    }
    let (moved, named) = (input_paths.train.len(), job.data.train.len());
    if moved != 0 && moved != named {
        let message = format!("data.train has {named} files; pass --train for all of them, in this order");
        return Err(wrong(message));
    }
    let job_files = job_files(input_paths, job);
    let base = Arc::new(Base::load(&job_files.base, job.base_layout(), &device)?);
    let mut run = Run::prepare(job, &job_files, base, &CancelToken::new())?;
    let found = run.input_hashes(receipt.steps.len() as u64);
    let train_files = found.train_files.iter().zip(&receipt.train_files_sha256);
    let compared_files = train_files
        .zip(&job_files.train)
        .map(|((found, expected), file)| (format!("data.train: {}", file.name().display()), found, expected));
    let eval = found.eval.as_ref().zip(receipt.eval_sha256.as_ref());
    let of_field = |field: &str, found, expected| (field.to_owned(), found, expected);
    let compared = std::iter::once(of_field("model.base", &found.base, &receipt.base_sha256))
        .chain(compared_files)
        .chain([of_field("data.train", &found.train, &receipt.train_sha256)])
        .chain(eval.map(|(found, expected)| of_field("data.eval", found, expected)))
        .chain([of_field("the order of the rows", &found.order, &receipt.order_sha256)]);
    for (field, found, expected) in compared {
        if found != expected {
            return Err(wrong(format!("{field} was changed: its SHA-256 is {found}, not {expected}")));
        }
    }
    let steps = steps.min(receipt.steps.len() as u64);
    for expected in &receipt.steps[..steps as usize] {
        run.step(|| false)?;
        let found = run.history().last();
        let same = |field: fn(&StepRecord) -> Option<u64>| found.and_then(field) == field(expected);
        let bits = same(|r| r.loss.map(f64::to_bits)) && same(|r| r.grad_norm.map(f64::to_bits));
        if !bits || found.map(|r| &r.state) != Some(&expected.state) {
            let start = match job.adapter.init_lora_weights {
                InitLoraWeights::Default => "",
                _ => {
                    " (the adapter is initialized from the base's weights; another processor model may \
                     compute other initial bits)"
                }
            };
            let numbers = |record: Option<&StepRecord>| record.map_or("no step".into(), step_numbers);
            return Err(wrong(format!(
                "step {} gave other bits{start}: {} instead of {}",
                expected.step,
                numbers(found),
                step_numbers(expected)
            )));
        }
    }
    Ok(Verification {
        files,
        replayed_steps: steps,
        steps: receipt.steps.len() as u64,
        adapter_sha256: receipt.adapter_sha256,
    })
}

/// The numbers of a step that `verify` compares, for users.
fn step_numbers(record: &StepRecord) -> String {
    let number = |value: Option<f64>| value.map_or("none".into(), |value| value.to_string());
    let (loss, norm) = (number(record.loss), number(record.grad_norm));
    format!("loss {loss}, grad_norm {norm}, state {}", record.state)
}

/// Returns the files of `job` at their current paths.
fn job_files(moved: &InputPaths, job: &JobSpec) -> JobFiles {
    let named = JobFiles::from_job(job);
    JobFiles {
        base: moved.base.as_ref().map_or(named.base, SourceDir::from),
        train: if moved.train.is_empty() {
            named.train
        } else {
            moved.train.iter().map(SourceFile::from).collect()
        },
        eval: named.eval.map(|eval| moved.eval.as_ref().map_or(eval, SourceFile::from)),
        init_from: named.init_from.map(|dir| moved.init_from.as_ref().map_or(dir, SourceDir::from)),
        tokens: None,
    }
}
