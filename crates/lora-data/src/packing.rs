//! Packing: several samples in one row.

use std::collections::BTreeSet;

use crate::batch::inputs;

/// Packs samples into rows of at most `capacity` inputs, best fit decreasing, as TRL's strategy
/// `bfd`: the samples are taken from the longest on (equal ones by their index), and each goes into
/// the row in which it leaves the least space, of several such rows into the first one. A sample
/// with more inputs gets a row of its own. `lengths` are in tokens, by dataset index.
pub(crate) fn pack(mut samples: Vec<usize>, lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    samples.sort_unstable_by_key(|&sample| (std::cmp::Reverse(lengths[sample]), sample));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // The space that is left in each row, and the row's index.
    let mut spaces: BTreeSet<(usize, usize)> = BTreeSet::new();
    for sample in samples {
        let needed = inputs(lengths[sample]);
        let best = spaces.range((needed, 0)..).next().copied();
        let (space, row) = match best {
            Some(best) => {
                spaces.remove(&best);
                best
            }
            None => {
                rows.push(Vec::new());
                (capacity.max(needed), rows.len() - 1)
            }
        };
        rows[row].push(sample);
        spaces.insert((space - needed, row));
    }
    rows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn samples_go_where_they_leave_the_least_space() {
        // Inputs 4, 6, 3, 4, 2, 9: 9 | 6 4 | 4 3 2 | with rows of 10.
        let rows = pack((0..6).collect(), &[5, 7, 4, 5, 3, 10], 10);
        assert_eq!(rows, [vec![5], vec![1, 0], vec![3, 2, 4]]);
        assert_eq!(pack(vec![0, 1], &[20, 2], 10), [vec![0], vec![1]]);
        assert!(pack(Vec::new(), &[], 10).is_empty());
    }

    proptest! {
        #[test]
        fn every_sample_is_in_one_row_and_no_row_is_too_long(
            lengths in prop::collection::vec(1_usize..40, 0..60), capacity in 40_usize..90,
        ) {
            let rows = pack((0..lengths.len()).collect(), &lengths, capacity);
            let mut all: Vec<usize> = rows.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let used = |row: &Vec<usize>| row.iter().map(|sample| lengths[*sample] - 1).sum::<usize>();
            prop_assert!(rows.iter().all(|row| used(row) <= capacity));
            // No row could have taken all samples of a later one.
            for (i, row) in rows.iter().enumerate() {
                for later in &rows[i + 1..] {
                    prop_assert!(used(row) + lengths[later[0]] - 1 > capacity);
                }
            }
        }
    }
}
