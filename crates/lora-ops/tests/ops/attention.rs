//! Attention against the definition: softmax of the masked scores, in f64.

use candle_core::{IndexOp, Tensor};
use lora_ops::attention::{Shape, backward, forward};

use crate::common::{assert_close, assert_gradient, dot, error, matrix, wide};

/// Several key tiles (128) and query tiles (64), none of them full at the end, two query heads a key/value head.
const LONG: Shape = Shape { batch: 2, seq: 283, kv_seq: 283, heads: 2, kv_heads: 1, head_dim: 6 };

fn shapes(batch: usize, seq: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Shape {
    Shape { batch, seq, kv_seq: seq, heads, kv_heads, head_dim }
}

fn inputs(shape: Shape, spread: f64) -> (Tensor, Tensor, Tensor) {
    let Shape { batch, seq, kv_seq, heads, kv_heads, head_dim } = shape;
    let keys = (batch * kv_seq, kv_heads * head_dim);
    let q = matrix((batch * seq, heads * head_dim), 1).affine(spread, 0.0).unwrap();
    (q, matrix(keys, 2).affine(spread, 0.0).unwrap(), matrix(keys, 3))
}

fn reference(q: &[f64], k: &[f64], v: &[f64], shape: Shape) -> Vec<f64> {
    let Shape { batch, seq, kv_seq, heads, kv_heads, head_dim } = shape;
    let mut output = vec![0.0; batch * seq * heads * head_dim];
    for sequence in 0..batch {
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            for query in 0..seq {
                let q_at = ((sequence * seq + query) * heads + head) * head_dim;
                let k_at = |key: usize| ((sequence * kv_seq + key) * kv_heads + kv_head) * head_dim;
                let seen = kv_seq - seq + query + 1;
                let q = &q[q_at..q_at + head_dim];
                let scores: Vec<f64> = (0..seen)
                    .map(|key| dot(q, &k[k_at(key)..k_at(key) + head_dim]) / (head_dim as f64).sqrt())
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                for (key, score) in scores.iter().enumerate() {
                    let p = (score - top).exp() / total;
                    let v = &v[k_at(key)..k_at(key) + head_dim];
                    output[q_at..q_at + head_dim].iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                }
            }
        }
    }
    output
}

#[test]
fn attention_and_its_gradients_follow_the_definition() {
    let small = [
        shapes(1, 1, 1, 1, 2),
        shapes(2, 5, 2, 1, 4),
        shapes(1, 64, 3, 3, 8),
        shapes(1, 65, 9, 3, 4),
        shapes(1, 128, 2, 2, 3),
        shapes(1, 129, 2, 1, 16),
    ];
    for shape in small.into_iter().chain([LONG]) {
        let (q, k, v) = inputs(shape, 2.0);
        let (output, saved) = forward(&q, &k, &v, shape).unwrap();
        assert_close(
            &format!("{shape:?}"),
            &output,
            &reference(&wide(&q), &wide(&k), &wide(&v), shape),
            3e-6,
        );
        let d_output = matrix(q.dims2().unwrap(), 4);
        let upstream = wide(&d_output);
        let (dq, dk, dv) = backward(&saved, (&q, &k, &v), &output, &d_output, shape).unwrap();
        let loss = |i: &[Vec<f64>]| dot(&reference(&i[0], &i[1], &i[2], shape), &upstream);
        let single = shape.seq == 1;
        for (which, (name, gradient)) in [("dq", &dq), ("dk", &dk), ("dv", &dv)].into_iter().enumerate() {
            let what = format!("{name} of {shape:?}");
            if single && which < 2 {
                // One key has probability 1 whatever its score.
                assert!(wide(gradient).iter().all(|g| g.abs() < 1e-6), "{what}");
            } else {
                assert_gradient(&what, gradient, &[&q, &k, &v], which, loss, 1e-5);
            }
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let shape = shapes(1, 150, 2, 1, 8);
    let (q, k, v) = inputs(shape, 60.0);
    let (output, saved) = forward(&q, &k, &v, shape).unwrap();
    let expected = reference(&wide(&q), &wide(&k), &wide(&v), shape);
    assert!(error(&wide(&output), &expected) < 1e-3);
    let (dq, dk, dv) = backward(&saved, (&q, &k, &v), &output, &output, shape).unwrap();
    assert!([dq, dk, dv].iter().all(|g| wide(g).iter().all(|g| g.is_finite())));
}

#[test]
fn new_queries_over_cached_keys_give_the_last_rows_of_the_whole() {
    let whole = shapes(1, 200, 4, 2, 8);
    let (q, k, v) = inputs(whole, 2.0);
    let expected = forward(&q, &k, &v, whole).unwrap().0;
    for new in [1, 7, 72, 200] {
        let shape = Shape { seq: new, ..whole };
        let last = q.i(200 - new..).unwrap().contiguous().unwrap();
        let got = forward(&last, &k, &v, shape).unwrap().0;
        assert_close(&format!("{new} queries"), &got, &wide(&expected.i(200 - new..).unwrap()), 1e-6);
    }
}

#[test]
fn later_tokens_do_not_change_earlier_ones() {
    let shape = shapes(1, 140, 2, 1, 8);
    let (q, k, v) = inputs(shape, 1.0);
    let (before, _) = forward(&q, &k, &v, shape).unwrap();
    let change = |t: &Tensor| {
        lora_ops::update_f32(t, |x| {
            let from = x.len() / 140 * 100;
            x[from..].fill(9.0);
        })
    };
    change(&k).unwrap();
    change(&v).unwrap();
    let (after, _) = forward(&q, &k, &v, shape).unwrap();
    assert_eq!(wide(&before.i(..100).unwrap()), wide(&after.i(..100).unwrap()));
    assert_ne!(wide(&before.i(100..).unwrap()), wide(&after.i(100..).unwrap()));
}
