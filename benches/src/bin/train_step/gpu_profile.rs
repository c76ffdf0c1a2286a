//! The profile of a training step on a GPU: the time by kernel and product shape, by class, and
//! between kernels.

use std::fmt::Write;

use lora_ops::ceilings::Ceilings;
use lora_ops::profile::Timing;
use lora_plan::attention_flops;
use lora_spec::{AdapterSpec, ModelConfig};
use serde_json::{Value, json};

use crate::args::MicroBatchCase;

/// The printed names of the classes of kernels and products.
const FROZEN: &str = "frozen products";
const HEAD: &str = "head products";
const LORA: &str = "LoRA products";
const ATTENTION: &str = "attention";
const ELEMENTWISE: &str = "norm, rope, glu, add";
const DEQUANTIZE: &str = "dequantize";
const CROSS_ENTROPY: &str = "cross-entropy";
const OPTIMIZER: &str = "optimizer, sums, hash";
const OTHER: &str = "other";

/// The means over the profiled steps.
pub(crate) struct GpuProfile {
    /// Kernels and products, the longest first.
    rows: Vec<ProfileRow>,
    /// Classes, the longest first. `name` is the class.
    classes: Vec<ProfileRow>,
    /// The mean time of a profiled step, in milliseconds.
    profiled_step: f64,
    /// The median time of a step without events, in milliseconds.
    unprofiled_step: f64,
}

/// The numbers of a kernel, product or class, per step.
struct ProfileRow {
    name: String,
    class: &'static str,
    count: f64,
    milliseconds: f64,
    bytes: f64,
    flops: f64,
}

impl GpuProfile {
    /// Creates the profile from the timings of `steps` steps with a mean time of `profiled`
    /// seconds. Steps without events have a median time of `unprofiled` seconds.
    pub(crate) fn new(
        timings: Vec<Timing>,
        steps: usize,
        profiled: f64,
        unprofiled: f64,
        config: &ModelConfig,
        case: MicroBatchCase,
    ) -> Self {
        let steps = steps as f64;
        let mut rows: Vec<ProfileRow> = timings
            .into_iter()
            .map(|timing| {
                let class = class(&timing, config.vocab_size);
                ProfileRow {
                    class,
                    count: timing.count as f64 / steps,
                    milliseconds: timing.milliseconds / steps,
                    // Not all operands of attention are known.
                    bytes: if class == ATTENTION { 0.0 } else { timing.bytes as f64 / steps },
                    flops: timing.flops as f64 / steps,
                    name: timing.name,
                }
            })
            .collect();
        rows.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        let mut classes: Vec<ProfileRow> = Vec::new();
        for row in &rows {
            let known = classes.iter().position(|class| class.name == row.class);
            let at = known.unwrap_or_else(|| {
                classes.push(ProfileRow::empty(row.class));
                classes.len() - 1
            });
            let class = &mut classes[at];
            class.count += row.count;
            class.milliseconds += row.milliseconds;
            class.bytes += row.bytes;
            class.flops += row.flops;
        }
        if let Some(attention) = classes.iter_mut().find(|class| class.class == ATTENTION) {
            let positions = u64::from(case.positions.get());
            attention.flops = f64::from(case.rows.get()) * attention_flops(config, positions) as f64;
        }
        classes.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        Self { rows, classes, profiled_step: profiled * 1e3, unprofiled_step: unprofiled * 1e3 }
    }

    /// Returns the time of all kernels and products, in milliseconds per step.
    fn busy(&self) -> f64 {
        self.rows.iter().map(|row| row.milliseconds).sum()
    }

    /// Returns the tables as text.
    pub(crate) fn table(&self, ceilings: &Ceilings) -> String {
        let mut table = String::new();
        let line = |table: &mut String, row: &ProfileRow| {
            let cell = |value: Option<f64>, digits: usize| {
                value.map_or_else(String::new, |value| format!("{value:.digits$}"))
            };
            let _ = writeln!(
                table,
                "{:<50}{:>9.3}{:>9.1}{:>9}{:>9}{:>9.1}{:>11}",
                row.name,
                row.milliseconds,
                row.count,
                cell(row.gb_s(), 0),
                cell(row.tflop_s(), 1),
                row.percent_of(self.profiled_step),
                cell(row.percent_of_ceiling(ceilings), 0),
            );
        };
        let head = |what: &str| {
            format!(
                "{what:<50}{:>9}{:>9}{:>9}{:>9}{:>9}{:>11}\n",
                "ms", "count", "GB/s", "TFLOP/s", "% step", "% ceiling"
            )
        };
        table += &head("kernel or product, per step");
        self.rows.iter().for_each(|row| line(&mut table, row));
        table += &format!("\n{}", head("class"));
        self.classes.iter().for_each(|class| line(&mut table, class));
        let busy = self.busy();
        let gap = |step: f64| (step - busy, 100.0 * (step - busy) / step);
        let ((profiled, profiled_percent), (unprofiled, unprofiled_percent)) =
            (gap(self.profiled_step), gap(self.unprofiled_step));
        let _ = writeln!(
            table,
            "\nkernels             {busy:.3} ms of a profiled step of {:.3} ms",
            self.profiled_step
        );
        let _ = writeln!(
            table,
            "gaps                {profiled:.3} ms ({profiled_percent:.1} %); of an unprofiled step of \
             {:.3} ms {unprofiled:.3} ms ({unprofiled_percent:.1} %)",
            self.unprofiled_step
        );
        let _ = write!(table, "{}", ceilings_line(ceilings));
        table
    }

    /// Adds the profile to the JSON of a case.
    pub(crate) fn add_to(&self, result: &mut Value, ceilings: &Ceilings) {
        let rows = |rows: &[ProfileRow]| -> Vec<Value> {
            let row = |row: &ProfileRow| {
                json!({
                    "name": row.name,
                    "class": row.class,
                    "count": row.count,
                    "milliseconds": row.milliseconds,
                    "gb_s": row.gb_s(),
                    "tflop_s": row.tflop_s(),
                    "percent_of_step": row.percent_of(self.profiled_step),
                    "percent_of_ceiling": row.percent_of_ceiling(ceilings),
                })
            };
            rows.iter().map(row).collect()
        };
        let busy = self.busy();
        result["profile"] = rows(&self.rows).into();
        result["profile_classes"] = rows(&self.classes).into();
        result["profiled_step_milliseconds"] = self.profiled_step.into();
        result["kernel_milliseconds"] = busy.into();
        result["gap_milliseconds"] = (self.unprofiled_step - busy).into();
        result["profiled_gap_milliseconds"] = (self.profiled_step - busy).into();
        result["ceilings"] = json!({
            "product_side": ceilings.product_side,
            "tflop_s": ceilings.tflop_s,
            "copy_bytes": ceilings.copy_bytes,
            "gb_s": ceilings.gb_s,
        });
    }
}

fn ceilings_line(ceilings: &Ceilings) -> String {
    format!(
        "ceilings            {:.1} TFLOP/s (product of {side} x {side} x {side}), {:.1} GB/s (copy of \
         {:.0} MiB)",
        ceilings.tflop_s,
        ceilings.gb_s,
        ceilings.copy_bytes as f64 / f64::from(1 << 20),
        side = ceilings.product_side,
    )
}

impl ProfileRow {
    fn empty(class: &'static str) -> Self {
        Self { name: class.to_owned(), class, count: 0.0, milliseconds: 0.0, bytes: 0.0, flops: 0.0 }
    }

    fn gb_s(&self) -> Option<f64> {
        self.rate(self.bytes / 1e9)
    }

    fn tflop_s(&self) -> Option<f64> {
        self.rate(self.flops / 1e12)
    }

    fn rate(&self, amount: f64) -> Option<f64> {
        (amount > 0.0 && self.milliseconds > 0.0).then(|| amount / (self.milliseconds / 1e3))
    }

    fn percent_of(&self, milliseconds: f64) -> f64 {
        100.0 * self.milliseconds / milliseconds
    }

    /// Returns the percentage of the nearer ceiling.
    fn percent_of_ceiling(&self, ceilings: &Ceilings) -> Option<f64> {
        let memory = self.gb_s().map(|rate| 100.0 * rate / ceilings.gb_s);
        let product = self.tflop_s().map(|rate| 100.0 * rate / ceilings.tflop_s);
        memory.into_iter().chain(product).max_by(f64::total_cmp)
    }
}

/// Returns the class of a kernel, from the operation in its name, or of a product, from its sizes.
fn class(timing: &Timing, vocab: usize) -> &'static str {
    if let Some(sizes) = timing.product {
        return match sizes {
            _ if sizes.contains(&AdapterSpec::default().r) => LORA,
            _ if sizes.contains(&vocab) => HEAD,
            _ => FROZEN,
        };
    }
    let starts_with = |prefixes: &[&str]| prefixes.iter().any(|prefix| timing.name.starts_with(prefix));
    match () {
        () if starts_with(&["attention_"]) => ATTENTION,
        () if starts_with(&["rms_norm_", "layer_norm_", "rope_", "glu_", "pointwise_add_"]) => ELEMENTWISE,
        () if starts_with(&["quant_"]) => DEQUANTIZE,
        () if starts_with(&["cross_entropy_"]) => CROSS_ENTROPY,
        () if starts_with(&["adamw_", "reduce_", "pointwise_round_"]) => OPTIMIZER,
        () => OTHER,
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::published_models::model_config;

    fn timing(name: &str, product: Option<[usize; 3]>, milliseconds: f64) -> Timing {
        let flops = product.map_or(0, |[m, n, k]| 2 * (m * n * k) as u64);
        Timing { name: name.to_owned(), product, count: 4, milliseconds, bytes: 2_000_000, flops }
    }

    #[test]
    fn rows_are_means_per_step_and_add_up() {
        let config = model_config("llama-3.1-8b").unwrap();
        let case =
            MicroBatchCase { rows: NonZeroU32::new(2).unwrap(), positions: NonZeroU32::new(64).unwrap() };
        let timings = vec![
            timing("product 128x4096x4096 nt bf16", Some([128, 4096, 4096]), 8.0),
            timing("product 128x4096x16 nt bf16 +=", Some([128, 4096, 16]), 2.0),
            timing("product 128x128256x4096 nt bf16>f32", Some([128, 128_256, 4096]), 12.0),
            timing("attention_forward_mma_128_bf16", None, 4.0),
            timing("rms_norm_forward_bf16", None, 1.0),
            timing("glu_forward_silu_bf16", None, 3.0),
            timing("quant_four_bit_bf16", None, 0.5),
            timing("reduce_scale_f32", None, 0.25),
            timing("embedding_forward_bf16", None, 0.125),
        ];
        let profile = GpuProfile::new(timings, 2, 0.020, 0.018, &config, case);
        let ceilings = Ceilings { product_side: 8192, tflop_s: 700.0, copy_bytes: 1 << 32, gb_s: 3000.0 };
        let mut result = json!({});
        profile.add_to(&mut result, &ceilings);
        let rows = result["profile"].as_array().unwrap();
        assert_eq!(rows[0]["name"], "product 128x128256x4096 nt bf16>f32");
        assert_eq!((&rows[0]["class"], &rows[0]["count"]), (&json!(HEAD), &json!(2.0)));
        assert_eq!(rows[0]["milliseconds"], json!(6.0));
        let rate = |row: &Value, field: &str| row[field].as_f64().unwrap();
        let tflop_s = 2.0 * 128.0 * 128_256.0 * 4096.0 / 12e-3 / 1e12;
        assert!((rate(&rows[0], "tflop_s") - tflop_s).abs() < 1e-9);
        assert!((rate(&rows[0], "percent_of_ceiling") - 100.0 * tflop_s / 700.0).abs() < 1e-9);
        assert!((rate(&rows[0], "percent_of_step") - 30.0).abs() < 1e-9);
        assert!((rate(&result, "kernel_milliseconds") - 30.875 / 2.0).abs() < 1e-9);
        assert!((rate(&result, "gap_milliseconds") - (18.0 - 30.875 / 2.0)).abs() < 1e-9);
        assert!((rate(&result, "profiled_gap_milliseconds") - (20.0 - 30.875 / 2.0)).abs() < 1e-9);
        let classes = result["profile_classes"].as_array().unwrap();
        let class = |name: &str| classes.iter().find(|class| class["name"] == name).unwrap();
        let names = [FROZEN, LORA, HEAD, ATTENTION, ELEMENTWISE, DEQUANTIZE, OPTIMIZER, OTHER];
        assert_eq!(
            names.map(|name| rate(class(name), "milliseconds")),
            [4.0, 1.0, 6.0, 2.0, 2.0, 0.25, 0.125, 0.0625]
        );
        let attention = 2.0 * attention_flops(&config, 64) as f64 / 2e-3 / 1e12;
        assert!((rate(class(ATTENTION), "tflop_s") - attention).abs() < 1e-9);
        assert!(class(ATTENTION)["gb_s"].is_null());
        let table = profile.table(&ceilings);
        assert!(table.lines().all(|line| line.len() <= 110), "{table}");
        assert!(
            table.contains(
                "gaps                4.562 ms (22.8 %); of an unprofiled step of 18.000 ms 2.562 ms"
            ),
            "{table}"
        );
    }
}
