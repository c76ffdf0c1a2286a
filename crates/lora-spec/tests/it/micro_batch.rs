//! The documents of micro-batches.

use lora_spec::{Document, MicroBatch};

fn batch(rows: Vec<Vec<Document>>, seq_len: usize) -> MicroBatch {
    let positions = rows.len() * seq_len;
    let (tokens, targets, weights) = (vec![0; positions], vec![0; positions], vec![0.0; positions]);
    MicroBatch { rows, seq_len, tokens, targets, weights }
}

#[test]
fn every_position_belongs_to_a_document_and_padding_to_the_last_one() {
    let document = |sample, start, tokens| Document { sample, start, tokens };
    let rows = vec![
        vec![document(7, 0, 3), document(2, 2, 2), document(5, 3, 4)],
        vec![document(1, 0, 5), document(9, 4, 2)],
    ];
    let packed = batch(rows, 8);
    let samples: Vec<(usize, u64)> = packed.documents().map(|(at, it)| (at, it.sample)).collect();
    let expected = [[7, 7, 2, 5, 5, 5, 5, 5], [1, 1, 1, 1, 9, 9, 9, 9]];
    let expected: Vec<(usize, u64)> =
        expected.iter().flat_map(|row| row.iter().copied().enumerate()).collect();
    assert_eq!(samples, expected);
    assert!(packed.is_packed());
    assert_eq!(packed.longest_document(), 5);
}

#[test]
fn rows_of_one_document_are_not_packed() {
    let rows = batch(Document::whole_rows([4, 6], 3), 16);
    assert!(!rows.is_packed());
    assert_eq!(rows.longest_document(), 3);
    assert!(rows.documents().take(16).all(|(_, document)| document.sample == 4));
    assert_eq!(batch(Vec::new(), 4).longest_document(), 0);
}
