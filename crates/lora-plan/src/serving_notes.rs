//! Notes about what inference servers refuse or ignore in the adapter of a job: vLLM 0.33 and
//! SGLang 0.5.23, and llama.cpp of October 2026, which needs `loractl convert`.

use std::collections::BTreeSet;

use lora_spec::{AdapterSpec, LinearModule, Quantization};

/// Possible values of vLLM's `--max-lora-rank` (its `MaxLoRARanks`) from its default on.
const VLLM_RANKS: [usize; 7] = [16, 32, 64, 128, 256, 320, 512];
/// The projections of blocks that SGLang adapts.
const SGLANG_MODULES: [&str; 9] =
    ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"];
/// The projection of the embeddings of blocks (Gemma 4), which llama.cpp computes without adapters.
const NOT_IN_LLAMA_CPP: &str = "per_layer_model_projection";

/// Returns the notes about the result of a job with `adapter` on `modules`, some of the linear
/// modules `all` of the base, which is loaded in `quantization`.
pub(crate) fn serving_notes(
    adapter: &AdapterSpec,
    quantization: Quantization,
    modules: &[LinearModule],
    all: &[LinearModule],
) -> Vec<String> {
    let exported = adapter.exported();
    let rslora = exported.use_rslora.then(|| {
        let alpha = (adapter.lora_alpha * (adapter.r as f64).sqrt() * 1e6).round() / 1e6;
        format!(
            "SGLang ignores use_rslora and scales the adapter by lora_alpha / r; the same training that it \
             serves as trained has use_rslora false and lora_alpha {alpha}"
        )
    });
    let quantized = quantization.name().map(|name| {
        format!(
            "the adapter will fit the {name} values of the base: serve it over the base in bitsandbytes' \
             {name}, or serve the result of loractl merge"
        )
    });
    let sglang = sglang_names(modules).into_iter().chain(sglang_parts(modules, all));
    vllm_rank(exported.r)
        .into_iter()
        .chain(rslora)
        .chain(quantized)
        .chain(sglang)
        .chain(llama_cpp(modules))
        .collect()
}

/// Returns the lowest `--max-lora-rank` with which vLLM serves an adapter of rank `r`; `None` if it
/// serves none of this rank.
pub fn vllm_max_lora_rank(r: usize) -> Option<usize> {
    VLLM_RANKS.into_iter().find(|most| r <= *most)
}

/// Returns a note if vLLM does not serve an adapter of rank `r` with its default settings.
fn vllm_rank(r: usize) -> Option<String> {
    match vllm_max_lora_rank(r) {
        Some(rank) if rank == VLLM_RANKS[0] => None,
        Some(rank) => Some(format!(
            "vLLM serves rank {r} with --max-lora-rank {rank} (its default is {})",
            VLLM_RANKS[0]
        )),
        None => Some(format!("vLLM serves ranks up to {}, not {r}", VLLM_RANKS[VLLM_RANKS.len() - 1])),
    }
}

/// Returns a note if llama.cpp ignores adapters of some modules.
fn llama_cpp(modules: &[LinearModule]) -> Option<String> {
    modules.iter().any(|module| last(module) == NOT_IN_LLAMA_CPP).then(|| {
        format!(
            "llama.cpp does not adapt {NOT_IN_LLAMA_CPP}: leave it out of adapter.target_modules, or serve \
             the result of loractl merge"
        )
    })
}

/// Returns a note if SGLang refuses adapters of some modules by their names.
fn sglang_names(modules: &[LinearModule]) -> Option<String> {
    let names: BTreeSet<&str> = modules.iter().map(last).collect();
    let refused: Vec<&str> = names.into_iter().filter(|name| !SGLANG_MODULES.contains(name)).collect();
    (!refused.is_empty()).then(|| {
        format!(
            "SGLang does not load adapters of {}: leave them out of adapter.target_modules, or serve the \
             result of loractl merge",
            refused.join(", ")
        )
    })
}

/// The last part of a module's name.
fn last(module: &LinearModule) -> &str {
    module.name.rsplit('.').next().unwrap_or_default()
}

/// Returns a note if SGLang refuses or ignores adapters of parts of a product. It computes the
/// queries, keys and values of a block in one product, and the two halves of the MLP in another.
fn sglang_parts(modules: &[LinearModule], all: &[LinearModule]) -> Option<String> {
    let layers: BTreeSet<usize> = modules.iter().map(|module| module.layer).collect();
    layers.into_iter().find_map(|layer| {
        let is_in = |modules: &[LinearModule], name: &str| {
            modules.iter().any(|module| module.layer == layer && last(module) == name)
        };
        let has = |name| is_in(modules, name);
        let (q, k, v) = (has("q_proj"), has("k_proj"), has("v_proj"));
        let (does, which, lacks): (_, _, &[&str]) = match (q, k, v) {
            (true, _, false) => ("does not load", "q_proj", &["v_proj"]),
            (false, true, true) => ("ignores", "k_proj and v_proj", &["q_proj"]),
            (false, true, false) => ("ignores", "k_proj", &["q_proj", "v_proj"]),
            (false, false, true) => ("ignores", "v_proj", &["q_proj"]),
            _ if has("up_proj") && !has("gate_proj") => ("ignores", "up_proj", &["gate_proj"]),
            _ => return None,
        };
        // Some blocks have no such projection: their values are their keys, or those of another
        // block.
        let can_be_added = lacks.iter().all(|name| is_in(all, name));
        let lacks = lacks.join(" and ");
        let remedy = match can_be_added {
            true => format!("add {lacks} to adapter.target_modules, or serve"),
            false => "serve".to_owned(),
        };
        Some(format!(
            "SGLang {does} adapters of {which} without {lacks}, as in block {layer}: {remedy} the result of \
             loractl merge"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(names: &[&str]) -> Vec<LinearModule> {
        let module = |name: &&str| LinearModule {
            name: format!("model.layers.3.part.{name}"),
            layer: 3,
            in_features: 8,
            out_features: 8,
            bias: false,
        };
        names.iter().map(module).collect()
    }

    fn all() -> Vec<LinearModule> {
        modules(&SGLANG_MODULES)
    }

    #[test]
    fn ranks_above_the_vllm_default_get_a_note() {
        assert_eq!(vllm_rank(1), None);
        assert_eq!(vllm_rank(16), None);
        assert_eq!(
            vllm_rank(17).as_deref(),
            Some("vLLM serves rank 17 with --max-lora-rank 32 (its default is 16)")
        );
        assert!(vllm_rank(300).is_some_and(|note| note.contains("--max-lora-rank 320")));
        assert_eq!(vllm_rank(513).as_deref(), Some("vLLM serves ranks up to 512, not 513"));
    }

    #[test]
    fn parts_of_a_fused_projection_get_a_note() {
        for served in [
            &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"][..],
            &["q_proj", "v_proj"],
            &["o_proj", "gate_proj"],
            &["qkv_proj", "gate_up_proj"],
        ] {
            assert_eq!(sglang_parts(&modules(served), &all()), None, "{served:?}");
        }
        for (names, note) in [
            (&["q_proj", "k_proj"][..], "does not load adapters of q_proj without v_proj, as in block 3"),
            (&["k_proj", "v_proj"], "ignores adapters of k_proj and v_proj without q_proj"),
            (&["v_proj"], "ignores adapters of v_proj without q_proj"),
            (&["q_proj", "v_proj", "up_proj"], "ignores adapters of up_proj without gate_proj"),
        ] {
            let found = sglang_parts(&modules(names), &all()).unwrap();
            assert!(found.contains(note) && found.contains(": add "), "{found}");
        }
        // The values of the block are its keys.
        let names = modules(&["q_proj", "k_proj", "o_proj"]);
        let note = sglang_parts(&names, &names).unwrap();
        assert!(note.ends_with("as in block 3: serve the result of loractl merge"), "{note}");
    }

    #[test]
    fn modules_that_a_server_does_not_adapt_get_a_note() {
        let adapter = AdapterSpec::default();
        assert_eq!(
            serving_notes(&adapter, Quantization::None, &modules(&SGLANG_MODULES), &all()),
            Vec::<String>::new()
        );
        let notes = serving_notes(&adapter, Quantization::Int8, &modules(&SGLANG_MODULES), &all());
        assert!(notes.len() == 1 && notes[0].contains("over the base in bitsandbytes' int8"), "{notes:?}");
        let notes =
            serving_notes(&adapter, Quantization::None, &modules(&["q_proj", "c_fc", "c_proj"]), &all());
        assert!(notes[0].starts_with("SGLang does not load adapters of c_fc, c_proj: "), "{notes:?}");
        // Leaving them out would not be enough.
        assert!(notes.len() == 2 && notes[1].contains("adapters of q_proj without v_proj"), "{notes:?}");
        let notes = serving_notes(
            &adapter,
            Quantization::None,
            &modules(&["v_proj", "q_proj", NOT_IN_LLAMA_CPP]),
            &all(),
        );
        assert!(
            notes.len() == 2 && notes[1].starts_with("llama.cpp does not adapt per_layer_model"),
            "{notes:?}"
        );
    }

    #[test]
    fn rslora_gets_the_same_scale_without_it() {
        let adapter = AdapterSpec { r: 16, lora_alpha: 8.0, use_rslora: true, ..AdapterSpec::default() };
        let notes = serving_notes(&adapter, Quantization::None, &modules(&["q_proj", "v_proj"]), &all());
        assert!(notes.len() == 1 && notes[0].ends_with("use_rslora false and lora_alpha 32"), "{notes:?}");
        let plain = AdapterSpec { lora_alpha: 32.0, use_rslora: false, ..adapter.clone() };
        assert_eq!(plain.scaling(), adapter.scaling());
    }
}
