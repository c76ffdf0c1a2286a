//! Attention, compared with its definition: softmax of the masked scores, in f64.

use candle_core::{Device, IndexOp, Tensor};
use lora_ops::Ids;
use lora_ops::attention::{AttentionShape, backward, first_visible_keys, forward};

use crate::common::{assert_close, assert_gradient, dot, matrix, random, wide};

/// Several key tiles (of 128) and query tiles (of 64), each with an incomplete last tile, and two
/// query heads per key/value head.
const LONG: AttentionShape = AttentionShape {
    batch: 2,
    seq: 283,
    kv_seq: 283,
    heads: 2,
    kv_heads: 1,
    head_dim: 6,
    scale: 0.5,
    softcap: None,
};

fn inputs(shape: AttentionShape, spread: f64) -> (Tensor, Tensor, Tensor) {
    let AttentionShape { batch, seq, kv_seq, heads, kv_heads, head_dim, .. } = shape;
    let keys = (batch * kv_seq, kv_heads * head_dim);
    let q = matrix((batch * seq, heads * head_dim), 1).affine(spread, 0.0).unwrap();
    (q, matrix(keys, 2).affine(spread, 0.0).unwrap(), matrix(keys, 3))
}

fn ids(first: &[u32]) -> Ids {
    Ids::new(first, &Device::Cpu).unwrap()
}

/// Random documents, different in each sequence, of `about` tokens on average.
fn documents(shape: AttentionShape, about: usize) -> Vec<u32> {
    let mut document = 0;
    random(shape.batch * shape.seq, 9)
        .iter()
        .map(|&r| {
            document += u32::from(r > 1.0 - 2.0 / about as f32);
            document
        })
        .collect()
}

fn reference(q: &[f64], k: &[f64], v: &[f64], shape: AttentionShape, first: Option<&[u32]>) -> Vec<f64> {
    let AttentionShape { batch, seq, kv_seq, heads, kv_heads, head_dim, scale, softcap } = shape;
    let capped = |score: f64| match softcap.map(f64::from) {
        None => score,
        Some(cap) => cap * (score / cap).tanh(),
    };
    let mut output = vec![0.0; batch * seq * heads * head_dim];
    for sequence in 0..batch {
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            for query in 0..seq {
                let q_at = ((sequence * seq + query) * heads + head) * head_dim;
                let k_at = |key: usize| ((sequence * kv_seq + key) * kv_heads + kv_head) * head_dim;
                let from = first.map_or(0, |first| first[sequence * seq + query] as usize);
                let q = &q[q_at..q_at + head_dim];
                let scores: Vec<f64> = (from..=kv_seq - seq + query)
                    .map(|key| capped(dot(q, &k[k_at(key)..k_at(key) + head_dim]) * f64::from(scale)))
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                for (i, score) in scores.iter().enumerate() {
                    let p = (score - top).exp() / total;
                    let v = &v[k_at(from + i)..k_at(from + i) + head_dim];
                    output[q_at..q_at + head_dim].iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                }
            }
        }
    }
    output
}

#[test]
fn attention_and_its_gradients_match_the_definition() {
    let small = [
        AttentionShape::new(1, 1, 1, 1, 2),
        AttentionShape::new(2, 5, 2, 1, 4),
        AttentionShape::new(1, 3, 2, 1, 520),
        AttentionShape::new(1, 64, 3, 3, 8),
        AttentionShape::new(1, 65, 9, 3, 4),
        AttentionShape::new(1, 128, 2, 2, 3),
        AttentionShape::new(1, 129, 2, 1, 16),
    ];
    for shape in small.into_iter().chain([LONG]) {
        assert_matches_definition(shape, None);
        // Some of the scores are above the cap.
        assert_matches_definition(AttentionShape { softcap: Some(1.5), ..shape }, None);
    }
}

#[test]
fn sliding_windows_and_packed_documents_match_the_definition() {
    let windowed = |shape: AttentionShape, window: Option<usize>, documents: Option<&[u32]>| {
        assert_matches_definition(
            shape,
            Some(&first_visible_keys(shape.batch, shape.seq, window, documents)),
        );
    };
    for shape in [AttentionShape::new(2, 5, 2, 1, 4), AttentionShape::new(1, 129, 3, 1, 5)] {
        for window in [1, 3, 64, 1000] {
            windowed(shape, Some(window), None);
        }
    }
    windowed(LONG, Some(100), None);
    windowed(LONG, None, Some(&documents(LONG, 50)));
    windowed(LONG, Some(30), Some(&documents(LONG, 100)));
}

fn assert_matches_definition(shape: AttentionShape, first: Option<&[u32]>) {
    let (q, k, v) = inputs(shape, 2.0);
    let what = |of: &str| format!("{of} of {shape:?} with first keys {first:?}");
    let ids = first.map(ids);
    let (output, saved) = forward(&q, &k, &v, shape, ids.as_ref()).unwrap();
    let expected = reference(&wide(&q), &wide(&k), &wide(&v), shape, first);
    assert_close(&what("output"), &output, &expected, 3e-6);
    let d_output = matrix(q.dims2().unwrap(), 4);
    let upstream = wide(&d_output);
    let (dq, dk, dv) = backward(&saved, (&q, &k, &v), &output, &d_output, shape, ids.as_ref()).unwrap();
    let loss = |i: &[Vec<f64>]| dot(&reference(&i[0], &i[1], &i[2], shape, first), &upstream);
    // A single visible key has probability 1 for every score.
    let single =
        (0..shape.seq).all(|query| first.map_or(shape.seq == 1, |first| first[query] as usize == query));
    for (which, (name, gradient)) in [("dq", &dq), ("dk", &dk), ("dv", &dv)].into_iter().enumerate() {
        if single && which < 2 {
            assert!(wide(gradient).iter().all(|g| g.abs() < 1e-6), "{}", what(name));
        } else {
            assert_gradient(&what(name), gradient, &[&q, &k, &v], which, loss, 1e-5);
        }
    }
}

#[test]
fn first_keys_respect_window_and_document() {
    assert_eq!(first_visible_keys(2, 3, None, None), [0; 6]);
    assert_eq!(first_visible_keys(1, 5, Some(2), None), [0, 0, 1, 2, 3]);
    assert_eq!(first_visible_keys(1, 3, Some(1), None), [0, 1, 2]);
    let segments = [[4, 4, 4, 7, 7], [7, 7, 1, 4, 4]].concat();
    assert_eq!(first_visible_keys(2, 5, None, Some(&segments)), [0, 0, 0, 3, 3, 0, 0, 2, 3, 3]);
    assert_eq!(first_visible_keys(2, 5, Some(2), Some(&segments)), [0, 0, 1, 3, 3, 0, 0, 2, 3, 3]);
}

#[test]
fn packed_documents_do_not_attend_to_each_other() {
    let shape = AttentionShape::new(1, 200, 4, 2, 8);
    let (q, k, v) = inputs(shape, 2.0);
    let segments: Vec<u32> = (0..200).map(|t| u32::from(t >= 70) + u32::from(t >= 72)).collect();
    let first = ids(&first_visible_keys(1, 200, None, Some(&segments)));
    let (packed, saved) = forward(&q, &k, &v, shape, Some(&first)).unwrap();
    let (dq, dk, dv) = backward(&saved, (&q, &k, &v), &packed, &q, shape, Some(&first)).unwrap();
    for (from, to) in [(0, 70), (70, 72), (72, 200)] {
        let part = |x: &Tensor| x.i(from..to).unwrap().contiguous().unwrap();
        let (q, k, v) = (part(&q), part(&k), part(&v));
        let shape = AttentionShape::new(1, to - from, 4, 2, 8);
        let (alone, saved) = forward(&q, &k, &v, shape, None).unwrap();
        let (dq_alone, dk_alone, dv_alone) = backward(&saved, (&q, &k, &v), &alone, &q, shape, None).unwrap();
        for (packed, alone) in [(&packed, alone), (&dq, dq_alone), (&dk, dk_alone), (&dv, dv_alone)] {
            assert_close(&format!("positions {from} to {to}"), &part(packed), &wide(&alone), 1e-6);
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let shape = AttentionShape::new(1, 150, 2, 1, 8);
    let (q, k, v) = inputs(shape, 60.0);
    let (output, saved) = forward(&q, &k, &v, shape, None).unwrap();
    let expected = reference(&wide(&q), &wide(&k), &wide(&v), shape, None);
    assert_close("the output", &output, &expected, 1e-3);
    let (dq, dk, dv) = backward(&saved, (&q, &k, &v), &output, &output, shape, None).unwrap();
    assert!([dq, dk, dv].iter().all(|g| wide(g).iter().all(|g| g.is_finite())));
}

#[test]
fn attention_over_a_kv_cache_matches_full_attention() {
    let whole = AttentionShape::new(1, 200, 4, 2, 8);
    let (q, k, v) = inputs(whole, 2.0);
    for window in [None, Some(30)] {
        let first = first_visible_keys(1, 200, window, None);
        let expected = forward(&q, &k, &v, whole, Some(&ids(&first))).unwrap().0;
        for new in [1, 7, 72, 200] {
            let shape = AttentionShape { seq: new, ..whole };
            let last = q.i(200 - new..).unwrap().contiguous().unwrap();
            let got = forward(&last, &k, &v, shape, Some(&ids(&first[200 - new..]))).unwrap().0;
            let expected = wide(&expected.i(200 - new..).unwrap());
            assert_close(&format!("{new} queries, window {window:?}"), &got, &expected, 1e-6);
        }
    }
}

#[test]
fn attention_is_causal() {
    let shape = AttentionShape::new(1, 140, 2, 1, 8);
    let (q, k, v) = inputs(shape, 1.0);
    let (before, _) = forward(&q, &k, &v, shape, None).unwrap();
    for t in [&k, &v] {
        let x = &mut *lora_ops::update_f32(t, &[]).unwrap();
        let from = x.len() / 140 * 100;
        x[from..].fill(9.0);
    }
    let (after, _) = forward(&q, &k, &v, shape, None).unwrap();
    assert_eq!(wide(&before.i(..100).unwrap()), wide(&after.i(..100).unwrap()));
    assert_ne!(wide(&before.i(100..).unwrap()), wide(&after.i(100..).unwrap()));
}
