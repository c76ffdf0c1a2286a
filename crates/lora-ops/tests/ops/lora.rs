//! The low-rank update.

use candle_core::Tensor;
use lora_ops::dropout::Dropout;
use lora_ops::lora::{LoraPair, backward, backward_frozen, forward};

use crate::common::{assert_close, assert_gradient, dot, matrix, places, product, wide};

const TOKENS: usize = 13;
const IN: usize = 21;
const OUT: usize = 10;
const R: usize = 4;
const SCALING: f64 = 1.5;

fn dropout(probability: f64) -> Dropout {
    let tokens: Vec<(u32, u32)> = (0..TOKENS as u32).map(|t| (t / 5, t % 5)).collect();
    Dropout::new(3, "model.layers.0.self_attn.q_proj", 8, probability, places(&tokens))
}

/// `s ((x * mask) A^T) B^T`.
fn update(x: &[f64], mask: &[f64], a: &[f64], b: &[f64]) -> Vec<f64> {
    let dropped: Vec<f64> = x.iter().zip(mask).map(|(x, m)| x * m).collect();
    product(&product(&dropped, a, IN), b, R).iter().map(|y| y * SCALING).collect()
}

#[test]
fn update_and_gradients_match_the_definition_with_and_without_dropout() {
    for dropout in [None, Some(dropout(0.3))] {
        let (x, a, b) = (matrix((TOKENS, IN), 1), matrix((R, IN), 2), matrix((OUT, R), 3));
        let ones = Tensor::ones((TOKENS, IN), candle_core::DType::F32, x.device()).unwrap();
        let mask = wide(&dropout.as_ref().map_or(ones.clone(), |d| d.apply(&ones).unwrap()));
        assert_eq!(mask.contains(&0.0), dropout.is_some());
        let pair = LoraPair { a: a.clone(), b: b.clone() };

        let y = matrix((TOKENS, OUT), 4);
        let before = wide(&y);
        let saved = forward(&x, &pair, SCALING, dropout.as_ref(), &y).unwrap();
        let expected: Vec<f64> =
            update(&wide(&x), &mask, &wide(&a), &wide(&b)).iter().zip(&before).map(|(u, y)| u + y).collect();
        assert_close("output", &y, &expected, 1e-6);

        // Gradients are added to the existing values.
        let dy = matrix((TOKENS, OUT), 5);
        let grad = LoraPair { a: matrix((R, IN), 6), b: matrix((OUT, R), 7) };
        let dx = matrix((TOKENS, IN), 8);
        let start = [dx.copy().unwrap(), grad.a.copy().unwrap(), grad.b.copy().unwrap()];
        backward(&saved, &x, &pair, SCALING, dropout.as_ref(), &dy, &grad, Some(&dx)).unwrap();
        let upstream = wide(&dy);
        let loss = |i: &[Vec<f64>]| dot(&update(&i[0], &mask, &i[1], &i[2]), &upstream);
        for (which, (after, before)) in [&dx, &grad.a, &grad.b].into_iter().zip(&start).enumerate() {
            let added = (after - before).unwrap();
            assert_gradient(&format!("gradient {which}"), &added, &[&x, &a, &b], which, loss, 1e-5);
        }

        // The backward pass of a frozen pair gives the same gradient.
        if dropout.is_none() {
            let frozen = start[0].copy().unwrap();
            backward_frozen(&pair, SCALING, &dy, &frozen).unwrap();
            assert_eq!(wide(&frozen), wide(&dx));
            let narrow = matrix((TOKENS, OUT - 1), 5);
            assert!(backward_frozen(&pair, SCALING, &narrow, &frozen).is_err());
        }

        // If the gradient of the input is not needed, those of the matrices stay the same.
        let without_dx = LoraPair { a: start[1].copy().unwrap(), b: start[2].copy().unwrap() };
        backward(&saved, &x, &pair, SCALING, dropout.as_ref(), &dy, &without_dx, None).unwrap();
        assert_eq!((wide(&without_dx.a), wide(&without_dx.b)), (wide(&grad.a), wide(&grad.b)));
    }
}
