//! The global batch order.

use std::collections::HashSet;

use lora_data::{BatchPlan, Dataset, MicroBatchRows, Row, RowLayout, collate};
use lora_spec::Document;
use proptest::prelude::*;

fn plan(lengths: &[usize], seed: u64, shuffle: bool, global: usize, micro: usize) -> BatchPlan {
    BatchPlan::new(lengths.to_vec(), "00ff", seed, shuffle, global, unpacked(micro))
}

fn unpacked(micro_batch_size: usize) -> RowLayout {
    RowLayout { micro_batch_size, packed_len: None }
}

fn samples(micro_batches: &[MicroBatchRows]) -> Vec<usize> {
    micro_batches.iter().flat_map(MicroBatchRows::samples).collect()
}

fn epoch_rows(plan: &BatchPlan, epoch: u64) -> Vec<Vec<usize>> {
    let steps = plan.steps_per_epoch();
    (epoch * steps..(epoch + 1) * steps).map(|step| samples(&plan.step(step))).collect()
}

proptest! {
    #[test]
    fn an_epoch_visits_every_row_once(
        lengths in prop::collection::vec(2usize..200, 1..120), seed: u64, shuffle: bool,
        global in 1usize..40, micro in 1usize..9,
    ) {
        let plan = plan(&lengths, seed, shuffle, global, micro);
        for epoch in [0, 3] {
            let steps = epoch_rows(&plan, epoch);
            let (last, full) = steps.split_last().unwrap();
            prop_assert!(full.iter().all(|rows| rows.len() == global));
            prop_assert!((1..=global).contains(&last.len()));
            let mut rows = steps.concat();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn micro_batches_group_rows_of_similar_length_and_pad_to_the_longest(
        lengths in prop::collection::vec(2usize..200, 1..60), seed: u64, micro in 1usize..9,
    ) {
        let mut step = plan(&lengths, seed, true, lengths.len(), micro).step(0);
        prop_assert_eq!(step.len(), lengths.len().div_ceil(micro));
        for micro_batch in &step {
            let longest = micro_batch.samples().map(|row| lengths[row]).max().unwrap();
            prop_assert_eq!(micro_batch.padded_len % 16, 0);
            prop_assert!((micro_batch.padded_len - 15..=micro_batch.padded_len).contains(&(longest - 1)));
            prop_assert!(micro_batch.rows.len() <= micro);
        }
        step.sort_by_key(|micro_batch| micro_batch.rows[0].iter().map(|row| (lengths[*row], *row)).next());
        let sorted: Vec<_> = samples(&step).into_iter().map(|row| (lengths[row], row)).collect();
        prop_assert!(sorted.is_sorted());
    }

    #[test]
    fn a_step_does_not_depend_on_earlier_calls(seed: u64, steps in prop::collection::vec(0u64..30, 1..20)) {
        let lengths: Vec<usize> = (0..37).map(|i| 2 + i * 7 % 50).collect();
        let asked = plan(&lengths, seed, true, 8, 2);
        for step in steps {
            prop_assert_eq!(asked.step(step), plan(&lengths, seed, true, 8, 2).step(step));
        }
    }
}

#[test]
fn order_depends_on_seed_epoch_and_dataset_alone() {
    let lengths = vec![10; 50];
    let rows = |plan: BatchPlan, epoch| epoch_rows(&plan, epoch).concat();
    let orders = [
        rows(plan(&lengths, 1, true, 10, 10), 0),
        rows(plan(&lengths, 2, true, 10, 10), 0),
        rows(plan(&lengths, 1, true, 10, 10), 1),
        rows(BatchPlan::new(lengths.clone(), "11ff", 1, true, 10, unpacked(10)), 0),
    ];
    assert_eq!(orders.iter().collect::<HashSet<_>>().len(), orders.len());
    let step =
        |micro| samples(&plan(&lengths, 1, true, 10, micro).step(1)).into_iter().collect::<HashSet<_>>();
    assert_eq!(step(1), step(10), "the rows of a step do not depend on the micro-batch size");
}

/// Repeated runs depend on the order. If the order changes, the text in its key must change too.
#[test]
fn the_order_matches_the_documented_scheme() {
    let order: Vec<usize> =
        (0..10).map(|step| plan(&[2; 10], 42, true, 1, 1).step(step)[0].rows[0][0]).collect();
    assert_eq!(order, [4, 7, 2, 5, 9, 8, 1, 3, 6, 0], "computed in Python from the scheme's description");
}

#[test]
fn shuffling_is_uniform() {
    let mut counts = std::collections::HashMap::new();
    let plan = plan(&[2; 4], 7, true, 1, 1);
    for epoch in 0..24_000 {
        *counts.entry(epoch_rows(&plan, epoch).concat()).or_insert(0u32) += 1;
    }
    assert_eq!(counts.len(), 24);
    // 1000 expected; the standard deviation is 31.
    assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
}

#[test]
fn without_shuffling_every_epoch_has_the_order_of_the_file() {
    let plan = plan(&[5; 7], 1, false, 3, 3);
    assert_eq!(epoch_rows(&plan, 4), [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
}

#[test]
fn contiguous_ranges_of_micro_batches_hold_short_and_long_ones() {
    let lengths: Vec<usize> = (1..=32).map(|i| i * 16).collect();
    let padded: Vec<usize> = plan(&lengths, 1, true, 32, 1).step(0).iter().map(|m| m.padded_len).collect();
    let total: usize = padded.iter().sum();
    for ranks in [2, 4] {
        for share in padded.chunks(32 / ranks) {
            let share = share.iter().sum::<usize>() as f64 / total as f64 * ranks as f64;
            assert!((0.8..1.2).contains(&share), "{share}");
        }
    }
}

#[test]
fn evaluation_visits_every_row_in_batches_of_similar_length() {
    let mut micro_batches = unpacked(2).eval_micro_batches(&[40, 3, 20, 3, 41]);
    micro_batches.sort_by_key(|micro_batch| (micro_batch.padded_len, micro_batch.rows[0].clone()));
    let of = |rows: &[usize], padded_len| MicroBatchRows {
        rows: rows.iter().map(|row| vec![*row]).collect(),
        padded_len,
    };
    assert_eq!(micro_batches, [of(&[1, 3], 16), of(&[2, 0], 48), of(&[4], 48)]);
}

#[test]
fn a_plan_without_rows_has_no_steps() {
    let plan = plan(&[], 1, true, 4, 2);
    assert_eq!((plan.steps_per_epoch(), plan.step(0)), (0, vec![]));
    assert_eq!(unpacked(2).eval_micro_batches(&[]), []);
}

fn dataset(rows: Vec<Row>) -> Dataset {
    Dataset {
        rows: rows.into_iter().collect(),
        sha256: String::new(),
        report: Default::default(),
        token_files: Vec::new(),
        cache_problems: Vec::new(),
        files: Vec::new(),
    }
}

#[test]
fn collate_shifts_pads_and_weights_tokens() {
    let row = |tokens: &[u32], trained: &[bool]| Row { tokens: tokens.to_vec(), trained: trained.to_vec() };
    let rows = vec![
        row(&[9, 9], &[false, true]),
        row(&[1, 2, 3], &[false, false, true]),
        row(&[4, 5], &[false, true]),
    ];
    let dataset = dataset(rows);
    let document = |sample, tokens| vec![Document { sample, start: 0, tokens }];
    let batch = collate(&dataset, &MicroBatchRows { rows: vec![vec![2], vec![1]], padded_len: 3 });
    assert_eq!((batch.seq_len, &batch.rows), (3, &vec![document(2, 2), document(1, 3)]));
    assert_eq!(batch.tokens, [4, 0, 0, 1, 2, 0]);
    assert_eq!(batch.targets, [5, 0, 0, 2, 3, 0]);
    assert_eq!(batch.weights, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
}

#[test]
fn packed_rows_are_collated_one_after_another() {
    let row = |tokens: &[u32], trained: &[bool]| Row { tokens: tokens.to_vec(), trained: trained.to_vec() };
    let rows = vec![row(&[1, 2, 3], &[false, false, true]), row(&[4, 5], &[false, true])];
    let dataset = dataset(rows);
    let layout = RowLayout { micro_batch_size: 1, packed_len: Some(4) };
    let rows = layout.eval_micro_batches(&dataset.lengths()).remove(0);
    assert_eq!(rows, MicroBatchRows { rows: vec![vec![0, 1]], padded_len: 16 });
    let batch = collate(&dataset, &rows);
    let documents =
        [Document { sample: 0, start: 0, tokens: 3 }, Document { sample: 1, start: 2, tokens: 2 }];
    assert!(batch.is_packed() && batch.rows == [documents]);
    assert_eq!(batch.tokens[..4], [1, 2, 4, 0]);
    assert_eq!(batch.targets[..4], [2, 3, 5, 0]);
    assert_eq!(batch.weights[..4], [0.0, 1.0, 1.0, 0.0]);
    // The padding belongs to the last document.
    let of_token: Vec<_> = batch.documents().map(|(at, document)| (at, document.sample)).collect();
    assert_eq!(of_token[..4], [(0, 0), (1, 0), (2, 1), (3, 1)]);
    assert_eq!(of_token[15], (15, 1));
}

/// Packing changes only how the samples of a step are divided.
#[test]
fn packing_keeps_the_samples_of_each_step_and_computes_less() {
    let lengths: Vec<usize> = (0..60).map(|i| 20 + i * 37 % 400).collect();
    let with = |packed_len| {
        BatchPlan::new(lengths.clone(), "00ff", 3, true, 16, RowLayout { micro_batch_size: 2, packed_len })
    };
    let (separate, packed) = (with(None), with(Some(512)));
    for step in 0..separate.steps_per_epoch() {
        let sorted = |plan: &BatchPlan| {
            let mut samples = samples(&plan.step(step));
            samples.sort_unstable();
            samples
        };
        assert_eq!(sorted(&packed), sorted(&separate));
        assert!(packed.step(step).iter().all(|micro_batch| micro_batch.padded_len <= 512));
    }
    assert_eq!(packed.tokens(9), separate.tokens(9));
    let padding = packed.padding(RowLayout { micro_batch_size: 2, packed_len: Some(512) });
    assert!(padding < 0.1 && padding < packed.padding(unpacked(2)), "{padding}");
}
