//! The global batch order.

use std::collections::HashSet;

use lora_data::{BatchPlan, Dataset, MicroBatchRows, Row, collate, eval_micro_batches};
use proptest::prelude::*;

fn plan(lengths: &[usize], seed: u64, shuffle: bool, global: usize, micro: usize) -> BatchPlan {
    BatchPlan::new(lengths.to_vec(), "00ff", seed, shuffle, global, micro)
}

fn epoch_rows(plan: &BatchPlan, epoch: u64) -> Vec<Vec<usize>> {
    let steps = plan.steps_per_epoch();
    (epoch * steps..(epoch + 1) * steps)
        .map(|step| plan.step(step).into_iter().flat_map(|micro_batch| micro_batch.rows).collect())
        .collect()
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
            let longest = micro_batch.rows.iter().map(|&row| lengths[row]).max().unwrap();
            prop_assert_eq!(micro_batch.padded_len % 16, 0);
            prop_assert!((micro_batch.padded_len - 15..=micro_batch.padded_len).contains(&(longest - 1)));
            prop_assert!(micro_batch.rows.len() <= micro);
        }
        step.sort_by_key(|micro_batch| (lengths[micro_batch.rows[0]], micro_batch.rows[0]));
        let rows = step.into_iter().flat_map(|micro_batch| micro_batch.rows);
        let sorted: Vec<_> = rows.map(|row| (lengths[row], row)).collect();
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
        rows(BatchPlan::new(lengths.clone(), "11ff", 1, true, 10, 10), 0),
    ];
    assert_eq!(orders.iter().collect::<HashSet<_>>().len(), orders.len());
    let step = |micro| {
        let rows: Vec<usize> =
            plan(&lengths, 1, true, 10, micro).step(1).into_iter().flat_map(|m| m.rows).collect();
        rows.into_iter().collect::<HashSet<_>>()
    };
    assert_eq!(step(1), step(10), "the rows of a step do not depend on the micro-batch size");
}

/// Repeated runs depend on the order. If the order changes, the text in its key must change too.
#[test]
fn the_order_matches_the_documented_scheme() {
    let order: Vec<usize> =
        (0..10).map(|step| plan(&[2; 10], 42, true, 1, 1).step(step)[0].rows[0]).collect();
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
    let mut micro_batches = eval_micro_batches(&[40, 3, 20, 3, 41], 2);
    micro_batches.sort_by_key(|micro_batch| (micro_batch.padded_len, micro_batch.rows[0]));
    let of = |rows: &[usize], padded_len| MicroBatchRows { rows: rows.to_vec(), padded_len };
    assert_eq!(micro_batches, [of(&[1, 3], 16), of(&[2, 0], 48), of(&[4], 48)]);
}

#[test]
fn a_plan_without_rows_has_no_steps() {
    let plan = plan(&[], 1, true, 4, 2);
    assert_eq!((plan.steps_per_epoch(), plan.step(0)), (0, vec![]));
    assert_eq!(eval_micro_batches(&[], 2), []);
}

#[test]
fn collate_shifts_pads_and_weights_tokens() {
    let row = |tokens: &[u32], trained: &[bool]| Row { tokens: tokens.to_vec(), trained: trained.to_vec() };
    let rows = vec![
        row(&[9, 9], &[false, true]),
        row(&[1, 2, 3], &[false, false, true]),
        row(&[4, 5], &[false, true]),
    ];
    let dataset = Dataset { rows, sha256: String::new(), report: Default::default() };
    let batch = collate(&dataset, &MicroBatchRows { rows: vec![2, 1], padded_len: 3 });
    assert_eq!((batch.seq_len, batch.rows), (3, vec![2, 1]));
    assert_eq!(batch.tokens, [4, 0, 0, 1, 2, 0]);
    assert_eq!(batch.targets, [5, 0, 0, 2, 3, 0]);
    assert_eq!(batch.weights, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
}
