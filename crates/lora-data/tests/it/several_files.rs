//! Several training files with weights.

use std::collections::BTreeMap;

use lora_data::{BatchPlan, DataError, Dataset, TokenFiles, TokenRow};
use lora_spec::{DataSpec, JobSpec, SourceFile};

use crate::base_dir::BaseDir;

/// Files of `a0`, `a1`, ... `b0`, ...
fn read(files: &[usize], weights: &[f64]) -> Result<(BaseDir, Dataset), DataError> {
    let base = BaseDir::new("</s>", false);
    let sources: Vec<SourceFile> = files
        .iter()
        .zip("abc".chars())
        .map(|(rows, file)| {
            let lines = (0..*rows).map(|row| format!("{{\"text\": \"{file}{row}\"}}\n"));
            base.write(&format!("{file}.jsonl"), &lines.collect::<String>()).into()
        })
        .collect();
    let data = DataSpec { train_weights: weights.to_vec(), ..DataSpec::default() };
    let dataset = Dataset::read_all(&sources, &base.tokenizer(), &data, TokenFiles::default())?;
    Ok((base, dataset))
}

fn plan(dataset: &Dataset, shuffle: bool) -> BatchPlan {
    let mut job = JobSpec::default();
    job.data.shuffle = shuffle;
    job.training.global_batch_size = 4;
    BatchPlan::for_job(&job, dataset)
}

/// The rows of an epoch, in order.
fn epoch(plan: &BatchPlan, epoch: u64) -> Vec<usize> {
    let steps = plan.steps_per_epoch();
    let steps = (epoch * steps..(epoch + 1) * steps).map(|step| {
        let mut rows: Vec<usize> = plan.step(step).iter().flat_map(|rows| rows.samples()).collect();
        rows.sort_unstable();
        rows
    });
    steps.flatten().collect()
}

fn counts(rows: &[usize]) -> BTreeMap<usize, usize> {
    rows.iter().fold(BTreeMap::new(), |mut counts, row| {
        *counts.entry(*row).or_default() += 1;
        counts
    })
}

#[test]
fn rows_follow_file_by_file() {
    let (base, dataset) = read(&[3, 2], &[]).unwrap();
    let texts: Vec<String> =
        dataset.rows.iter().map(|row: TokenRow| base.tokenizer().marked_text(row).unwrap()).collect();
    assert_eq!(texts, ["a⟦0</s>⟧", "a⟦1</s>⟧", "a⟦2</s>⟧", "b⟦0</s>⟧", "b⟦1</s>⟧"]);
    assert_eq!((dataset.report.rows_read, dataset.report.rows_kept, dataset.report.tokens), (5, 5, 15));
    assert_eq!(epoch(&plan(&dataset, false), 1), [0, 1, 2, 3, 4]);
}

#[test]
fn an_epoch_has_rows_as_often_as_their_weight_says() {
    let (_, dataset) = read(&[8, 6, 10], &[1.0, 2.0, 1.3]).unwrap();
    let expected = 8 + 2 * 6 + 10 + 3;
    assert_eq!(dataset.epoch_rows(), expected);
    for shuffle in [true, false] {
        let plan = plan(&dataset, shuffle);
        assert_eq!(plan.steps_per_epoch(), (expected as u64).div_ceil(4));
        let epochs: Vec<BTreeMap<usize, usize>> = (0..4).map(|i| counts(&epoch(&plan, i))).collect();
        for counts in &epochs {
            assert!((0..8).all(|row| counts[&row] == 1) && (8..14).all(|row| counts[&row] == 2));
            let twice = (14..24).filter(|row| counts[row] == 2).count();
            assert_eq!((twice, counts.values().sum::<usize>()), (3, expected), "{counts:?}");
        }
        assert!(epochs.iter().any(|counts| *counts != epochs[0]), "each epoch chooses other rows");
        let all: Vec<usize> = (0..3).flat_map(|i| epoch(&plan, i)).collect();
        let tokens = |rows: &[usize]| rows.iter().map(|row| dataset.rows.row(*row).len() as u64).sum::<u64>();
        let steps = plan.steps_per_epoch();
        assert_eq!(plan.tokens(2 * steps + 3), tokens(&all[..2 * expected + 12]));
    }
}

#[test]
fn fewer_rows_than_the_file_are_taken_below_1() {
    let (_, dataset) = read(&[10], &[0.5]).unwrap();
    let rows = epoch(&plan(&dataset, true), 0);
    assert_eq!((rows.len(), counts(&rows).len()), (5, 5));
    assert_eq!(rows, epoch(&plan(&dataset, true), 0));
}

#[test]
fn one_file_without_weights_keeps_its_order_and_hash() {
    let (_, dataset) = read(&[9], &[]).unwrap();
    let (_, weighted) = read(&[9], &[1.0]).unwrap();
    assert_ne!(dataset.sha256, weighted.sha256);
    assert_eq!(dataset.files[0].sha256, dataset.sha256);
    let all = BatchPlan::new(
        dataset.lengths(),
        &dataset.sha256,
        JobSpec::default().training.seed,
        true,
        4,
        lora_data::RowLayout::for_job(&JobSpec::default()),
    );
    assert_eq!(epoch(&all, 3), epoch(&plan(&dataset, true), 3));
}

#[test]
fn weights_files_and_their_order_decide_the_hash() {
    let hash = |files: &[usize], weights: &[f64]| read(files, weights).unwrap().1.sha256;
    let first = hash(&[3, 2], &[]);
    assert_eq!(first, hash(&[3, 2], &[1.0, 1.0]));
    for other in [hash(&[2, 3], &[]), hash(&[3, 2], &[1.0, 1.5]), hash(&[3, 2], &[2.0, 1.0])] {
        assert_ne!(first, other);
    }
}

#[test]
fn a_weight_that_takes_no_row_is_an_error() {
    let error = read(&[3, 4], &[1.0, 0.1]).err().unwrap().to_string();
    assert!(
        error.ends_with("b.jsonl: data.train_weights: 0.1 takes none of its 4 rows; raise it"),
        "{error}"
    );
}

#[test]
fn notes_name_the_file_if_there_are_several() {
    let base = BaseDir::new("</s>", false);
    let file = |name: &str, row: &str| SourceFile::from(base.write(name, row));
    let (a, b) = (file("a.jsonl", "{\"text\": \"a\"}"), file("b.jsonl", "{\"text\": \"b\", \"id\": 1}"));
    let read = |files: &[SourceFile]| {
        Dataset::read_all(files, &base.tokenizer(), &DataSpec::default(), TokenFiles::default()).unwrap()
    };
    let note = "key \"id\" of 1 row has no effect";
    assert_eq!(read(std::slice::from_ref(&b)).notes(), [note]);
    assert_eq!(read(&[a, b.clone()]).notes(), [format!("{}: {note}", b.name().display())]);
}
