//! The global batch order: the rows of each step, on any number of workers.

use std::sync::{Arc, Mutex, PoisonError};

use lora_spec::JobSpec;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

use crate::batch::inputs;
use crate::joined::{DatasetFile, DatasetPart};
use crate::{Dataset, MicroBatchRows, RowLayout};

/// The rows of each step: a pure function of the dataset (hash and row lengths), the seed, the
/// epoch, the step, `shuffle` and the batch sizes.
///
/// The order of an epoch is a Fisher-Yates shuffle of the row indices (Knuth's Algorithm P, from
/// the last index down), or the order of the file if `shuffle` is off. The random words are the
/// ChaCha20 stream (64-bit counter from 0, stream 0) with the key
/// `SHA-256("lora-data row order 1" || dataset SHA-256 in lower-case hex || seed || epoch)`.
/// Numbers are 8 bytes, little endian. A draw below `n` uses 64-bit words and is unbiased (Lemire,
/// arXiv 1805.10941).
///
/// With weights, an epoch has the rows of a file as often as the whole part of its weight says, and
/// a choice of them once more for the fractional part: the first numbers of a Fisher-Yates shuffle
/// with the key `SHA-256("lora-data row choice 1" || ... || epoch || index of the file)`, in order.
///
/// A step takes the next `global_batch_size` rows of this order; the last step of an epoch takes
/// the remaining rows. The step's rows are packed if the job says so, sorted by length and divided
/// into micro-batches, which are put in van der Corput order.
#[derive(Debug)]
pub struct BatchPlan {
    lengths: Vec<usize>,
    parts: Vec<DatasetPart>,
    epoch_rows: usize,
    dataset_sha256: String,
    seed: u64,
    shuffle: bool,
    global_batch_size: usize,
    layout: RowLayout,
    /// The number and order of the last used epoch, so that not every step shuffles the rows.
    last_epoch: Mutex<Option<(u64, Arc<[usize]>)>>,
}

impl BatchPlan {
    /// Creates the plan for rows with these `lengths` (tokens, by dataset index). A batch size of 0
    /// counts as 1.
    pub fn new(
        lengths: Vec<usize>,
        dataset_sha256: &str,
        seed: u64,
        shuffle: bool,
        global_batch_size: usize,
        layout: RowLayout,
    ) -> Self {
        Self {
            epoch_rows: lengths.len(),
            parts: vec![DatasetPart { rows: lengths.len(), weight: 1.0 }],
            lengths,
            dataset_sha256: dataset_sha256.to_owned(),
            seed,
            shuffle,
            global_batch_size: global_batch_size.max(1),
            layout,
            last_epoch: Mutex::new(None),
        }
    }

    /// Creates the plan of `job` for the rows of `train`.
    pub fn for_job(job: &JobSpec, train: &Dataset) -> Self {
        let training = &job.training;
        let plan = Self::new(
            train.lengths(),
            &train.sha256,
            training.seed,
            job.data.shuffle,
            training.global_batch_size,
            RowLayout::for_job(job),
        );
        let parts = train.files.iter().map(DatasetFile::part).collect();
        Self { parts, epoch_rows: train.epoch_rows(), ..plan }
    }

    /// Returns the optimizer steps of a pass over the data. The last step may have fewer
    /// micro-batches.
    pub fn steps_per_epoch(&self) -> u64 {
        self.epoch_rows.div_ceil(self.global_batch_size) as u64
    }

    /// Returns the micro-batches of a step. Steps are counted from 0 over the whole job, so step
    /// `s` is in epoch `s / steps_per_epoch()`. A dataset without rows has no micro-batches.
    pub fn step(&self, step: u64) -> Vec<MicroBatchRows> {
        self.step_with(step, self.layout)
    }

    fn step_with(&self, step: u64, layout: RowLayout) -> Vec<MicroBatchRows> {
        let (Some(epoch), Some(index)) =
            (step.checked_div(self.steps_per_epoch()), step.checked_rem(self.steps_per_epoch()))
        else {
            return Vec::new();
        };
        let order = self.order(epoch);
        let start = index as usize * self.global_batch_size;
        let end = (start + self.global_batch_size).min(order.len());
        layout.micro_batches(order[start..end].to_vec(), &self.lengths)
    }

    /// Returns the tokens in the rows of the first `steps` steps, without padding.
    pub fn tokens(&self, steps: u64) -> u64 {
        let Some(epochs) = steps.checked_div(self.steps_per_epoch()) else { return 0 };
        let remaining = (epochs * self.steps_per_epoch()..steps).flat_map(|step| self.step(step));
        let of = |rows: MicroBatchRows| rows.samples().map(|row| self.lengths[row] as u64).sum::<u64>();
        let tail: u64 = remaining.map(of).sum();
        let of_epoch = |epoch| self.order(epoch).iter().map(|row| self.lengths[*row] as u64).sum::<u64>();
        let whole: u64 = match self.parts.iter().any(|part| part.extra_rows() > 0) {
            // Each epoch has other rows.
            true => (0..epochs).map(of_epoch).sum(),
            false => epochs.saturating_mul(of_epoch(0)),
        };
        whole.saturating_add(tail)
    }

    /// Returns the share of padding among the positions that are computed in the first epoch, if
    /// its rows had this layout.
    pub fn padding(&self, layout: RowLayout) -> f64 {
        let (mut computed, mut positions) = (0, 0);
        for micro_batch in (0..self.steps_per_epoch()).flat_map(|step| self.step_with(step, layout)) {
            computed += micro_batch.samples().map(|row| inputs(self.lengths[row])).sum::<usize>();
            positions += micro_batch.rows.len() * micro_batch.padded_len;
        }
        1.0 - computed as f64 / positions.max(1) as f64
    }

    fn order(&self, epoch: u64) -> Arc<[usize]> {
        let mut last = self.last_epoch.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((of, order)) if *of == epoch => order.clone(),
            _ => {
                let order: Arc<[usize]> = self.shuffled(epoch).into();
                *last = Some((epoch, order.clone()));
                order
            }
        }
    }

    /// The rows of an epoch before they are shuffled: part by part, as often as its weight says.
    fn rows_of_epoch(&self, epoch: u64) -> Vec<usize> {
        let mut rows = Vec::with_capacity(self.epoch_rows);
        let mut start = 0;
        for (index, part) in self.parts.iter().enumerate() {
            let all = start..start + part.rows;
            (0..part.copies()).for_each(|_| rows.extend(all.clone()));
            let mut random = self.random("lora-data row choice 1", epoch, &(index as u64).to_le_bytes());
            rows.extend(choose(&mut random, part.rows, part.extra_rows()).into_iter().map(|row| start + row));
            start = all.end;
        }
        rows
    }

    fn random(&self, purpose: &str, epoch: u64, part: &[u8]) -> ChaCha20Rng {
        let key = Sha256::new()
            .chain_update(purpose)
            .chain_update(&self.dataset_sha256)
            .chain_update(self.seed.to_le_bytes())
            .chain_update(epoch.to_le_bytes())
            .chain_update(part)
            .finalize();
        ChaCha20Rng::from_seed(key.into())
    }

    fn shuffled(&self, epoch: u64) -> Vec<usize> {
        let mut order = self.rows_of_epoch(epoch);
        if !self.shuffle {
            return order;
        }
        let mut random = self.random("lora-data row order 1", epoch, &[]);
        for i in (1..order.len()).rev() {
            order.swap(i, below(&mut random, i as u64 + 1) as usize);
        }
        order
    }
}

/// Chooses `count` of the numbers below `n`, and returns them in order.
fn choose(random: &mut ChaCha20Rng, n: usize, count: usize) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..n).collect();
    for i in 0..count {
        numbers.swap(i, i + below(random, (n - i) as u64) as usize);
    }
    numbers.truncate(count);
    numbers.sort_unstable();
    numbers
}

/// Returns an unbiased draw from `0..n`, for `n > 0`.
fn below(random: &mut ChaCha20Rng, n: u64) -> u64 {
    let biased = n.wrapping_neg() % n;
    loop {
        let product = u128::from(random.next_u64()) * u128::from(n);
        if product as u64 >= biased {
            return (product >> 64) as u64;
        }
    }
}
