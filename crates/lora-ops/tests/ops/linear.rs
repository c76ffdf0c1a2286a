//! Frozen linear layers, f32 and bf16.

use candle_core::{DType, Tensor};
use lora_ops::linear::FrozenLinear;

use crate::common::{assert_close, assert_gradient, dot, matrix, product, vector, wide};

/// `x W^T + b`.
fn reference(x: &[f64], layer: &Tensor, bias: Option<&[f64]>) -> Vec<f64> {
    let (out_features, in_features) = layer.dims2().unwrap();
    let mut y = product(x, &wide(layer), in_features);
    if let Some(bias) = bias {
        y.chunks_mut(out_features).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    }
    y
}

#[test]
fn output_and_gradient_match_the_definition() {
    // The bf16 weight of the last case is widened in three panels, the last of them incomplete.
    for (tokens, in_features, out_features) in [(1, 1, 1), (3, 5, 7), (17, 64, 33), (3, 1000, 2500)] {
        let bias = vector(out_features, 2);
        // The rounding error grows with the square root of a sum's length. The order of the sum,
        // and with it the error, depends on the processor.
        let limit = f64::from(f32::EPSILON / 2.0) * (in_features.max(out_features) as f64).sqrt();
        let limit = limit.max(1e-6);
        for (dtype, bias) in [(DType::F32, None), (DType::F32, Some(&bias)), (DType::BF16, Some(&bias))] {
            let what = format!("{dtype:?} {tokens} x {in_features} x {out_features}");
            let weight = matrix((out_features, in_features), 1).to_dtype(dtype).unwrap();
            let layer = FrozenLinear::new(weight.clone(), bias.cloned()).unwrap();
            let bytes = in_features * out_features * dtype.size_in_bytes();
            assert_eq!(layer.bytes(), bytes + bias.map_or(0, |_| 4 * out_features), "{what}");
            let x = matrix((tokens, in_features), 3);
            let expected = reference(&wide(&x), &weight, bias.map(wide).as_deref());
            assert_close(&what, &layer.forward(&x).unwrap(), &expected, limit);

            let dy = matrix((tokens, out_features), 4);
            let (upstream, weight) = (wide(&dy), wide(&weight));
            let dx = layer.backward(&dy).unwrap();
            if tokens * in_features < 2000 {
                let loss = |i: &[Vec<f64>]| dot(&product(&i[0], &weight, in_features), &upstream);
                assert_gradient(&what, &dx, &[&x], 0, loss, 1e-5);
            }
            let transposed: Vec<f64> = (0..in_features * out_features)
                .map(|i| weight[i % out_features * in_features + i / out_features])
                .collect();
            let expected = product(&upstream, &transposed, out_features);
            assert_close(&what, &dx, &expected, limit);

            let sum = x.copy().unwrap();
            layer.backward_add(&dy, &sum).unwrap();
            let expected: Vec<f64> = expected.iter().zip(wide(&x)).map(|(e, x)| e + x).collect();
            assert_close(&what, &sum, &expected, limit);
        }
    }
}
