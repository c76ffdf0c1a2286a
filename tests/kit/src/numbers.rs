//! Comparisons of numbers with a reference.

/// Returns the bits of each number, for comparisons that also distinguish zeros and NaNs.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Returns `max|got - expected| / max|expected|`, or NaN if a number of `got` is NaN.
pub fn relative_error(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0_f64, |max, value| max.max(value.abs()));
    let furthest = got.iter().zip(expected).fold(0.0_f64, |max, (got, expected)| {
        if got.is_nan() || max.is_nan() { f64::NAN } else { max.max((got - expected).abs()) }
    });
    furthest / largest
}

/// Fails if the [`relative_error`] of `got` is above `limit`.
pub fn assert_close(what: &str, got: &[f64], expected: &[f64], limit: f64) {
    let error = relative_error(got, expected);
    assert!(error <= limit, "{what} is off by {error:e}");
}

/// Fails if `gradient` differs from the central differences of `f` with respect to `inputs[which]`
/// by more than `limit`, as a [`relative_error`].
///
/// Of a long input, 60 elements that are spread over all of it are checked.
pub fn assert_gradient(
    what: &str,
    gradient: &[f64],
    inputs: &[Vec<f64>],
    which: usize,
    f: impl Fn(&[Vec<f64>]) -> f64,
    limit: f64,
) {
    const SAMPLES: usize = 60;
    const STEP: f64 = 1e-4;
    let mut inputs = inputs.to_vec();
    let n = gradient.len();
    assert_eq!(n, inputs[which].len(), "{what}");
    let samples = n.min(SAMPLES);
    let (mut got, mut expected) = (Vec::new(), Vec::new());
    for sample in 0..samples {
        // One element of each of `samples` equal parts, at a different offset in each part.
        let (from, to) = (sample * n / samples, (sample + 1) * n / samples);
        let i = from + (sample * 7919) % (to - from);
        let value = inputs[which][i];
        let mut at = |value: f64| {
            inputs[which][i] = value;
            f(&inputs)
        };
        expected.push((at(value + STEP) - at(value - STEP)) / (2.0 * STEP));
        inputs[which][i] = value;
        got.push(gradient[i]);
    }
    assert_close(what, &got, &expected, limit);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "off by NaN")]
    fn a_nan_is_never_close() {
        assert_close("the result", &[f64::NAN, 1.0], &[1.0, 1.0], 1.0);
    }

    #[test]
    fn a_gradient_is_compared_with_central_differences() {
        let inputs = [vec![0.5, -1.5, 2.0], vec![3.0]];
        let cubes = |inputs: &[Vec<f64>]| inputs[0].iter().map(|x| inputs[1][0] * x * x * x).sum();
        let gradient: Vec<f64> = inputs[0].iter().map(|x| 9.0 * x * x).collect();
        assert_gradient("the gradient", &gradient, &inputs, 0, cubes, 1e-7);
        let wrong: Vec<f64> = gradient.iter().map(|g| g * 1.001).collect();
        let refused = std::panic::catch_unwind(|| assert_gradient("", &wrong, &inputs, 0, cubes, 1e-7));
        assert!(refused.is_err());
    }
}
