//! The model card of an adapter: the README.md of its repository.

use lora_model::PeftConfig;
use lora_plan::vllm_max_lora_rank;
use lora_spec::Quantization;
use lora_train::Receipt;

use super::RepositoryName;

/// What a model card describes.
pub(crate) struct ModelCard<'a> {
    pub(crate) repository: &'a RepositoryName,
    /// The base's name on the hub.
    pub(crate) base: &'a RepositoryName,
    pub(crate) adapter: &'a PeftConfig,
    /// Whether `adapter` names this base, so that its revision is one of this base.
    pub(crate) base_is_named: bool,
    /// Whether the base has a vision tower too. Not every such class is one for causal language
    /// models.
    pub(crate) is_multimodal: bool,
    /// Whether the repository gets a tokenizer.
    pub(crate) has_tokenizer: bool,
    /// The description of the training, if loractl trained the adapter.
    pub(crate) receipt: Option<&'a Receipt>,
}

impl ModelCard<'_> {
    /// The text of the card. It names no file of the machine that trained the adapter.
    pub(crate) fn text(&self) -> String {
        let (repository, base) = (self.repository.as_str(), self.base.as_str());
        let name = repository.rsplit('/').next().unwrap_or_default();
        let tokenizer = if self.has_tokenizer { repository } else { base };
        let quantization = self.receipt.map(|receipt| receipt.job.base_layout().format.quantization);
        let (config, arguments) = match quantization {
            Some(Quantization::Nf4 { double_quant }) => (
                Some(format!(
                    "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=\"nf4\", \
                     bnb_4bit_use_double_quant={})",
                    if double_quant { "True" } else { "False" }
                )),
                ", quantization_config=quantization",
            ),
            Some(Quantization::Int8) => (
                Some("BitsAndBytesConfig(load_in_8bit=True)".to_owned()),
                ", quantization_config=quantization",
            ),
            Some(Quantization::None) | None => (None, ""),
        };
        let (import, config) = match config {
            Some(config) => (", BitsAndBytesConfig", format!("quantization = {config}\n")),
            None => ("", String::new()),
        };
        let (peft, transformers, load) = match self.is_multimodal {
            false => (
                "AutoPeftModelForCausalLM",
                "AutoTokenizer",
                format!("AutoPeftModelForCausalLM.from_pretrained(\"{repository}\"{arguments})"),
            ),
            true => (
                "PeftModel",
                "AutoModelForImageTextToText, AutoTokenizer",
                format!(
                    "AutoModelForImageTextToText.from_pretrained(\"{base}\"{arguments})\n\
                     model = PeftModel.from_pretrained(model, \"{repository}\")"
                ),
            ),
        };
        let mut text = format!(
            "---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n\
             - base_model:adapter:{base}\n- lora\n- loractl\n---\n\n# {name}\n\n\
             A LoRA adapter of [{base}](https://huggingface.co/{base}).\n\n## Use\n\n\
             ```python\nfrom peft import {peft}\nfrom transformers import {transformers}{import}\n\n\
             {config}model = {load}\n\
             tokenizer = AutoTokenizer.from_pretrained(\"{tokenizer}\")\n```\n"
        );
        if let Some(quantization) = quantization.and_then(Quantization::name) {
            text += &format!(
                "\nThe adapter was trained over the base in {quantization} with bitsandbytes' values, which \
                 are loaded here. For a server that cannot load them, merge the adapter into the \
                 dequantized weights.\n"
            );
        } else if let Some(rank) = vllm_max_lora_rank(self.adapter.r) {
            let revision = match &self.adapter.revision {
                Some(revision) if self.base_is_named => format!(" --revision {revision}"),
                _ => String::new(),
            };
            text += &format!(
                "\n```sh\nvllm serve {base}{revision} --enable-lora --max-lora-rank {rank} --lora-modules \
                 {name}={repository}\n```\n"
            );
        }
        text += "\n## Training\n\n";
        text += &self.receipt.map_or_else(|| self.adapter_rows(), |receipt| self.training(receipt));
        text
    }

    fn adapter_rows(&self) -> String {
        let rslora = if self.adapter.use_rslora { "true" } else { "false" };
        format!(
            "| | |\n| --- | --- |\n| r | {} |\n| lora_alpha | {} |\n| use_rslora | {rslora} |\n",
            self.adapter.r, self.adapter.lora_alpha
        )
    }

    fn training(&self, receipt: &Receipt) -> String {
        let mut text = self.adapter_rows();
        let training = &receipt.job.training;
        let mut row = |name: &str, value: String| text += &format!("| {name} | {value} |\n");
        row("trained parameters", receipt.trainable_parameters.to_string());
        row("learning_rate", training.learning_rate.to_string());
        row("global_batch_size", training.global_batch_size.to_string());
        row("steps", receipt.steps.len().to_string());
        row("exported after step", receipt.adapter_step.to_string());
        let last = receipt.steps.iter().rev().find_map(|step| step.loss);
        if let Some(loss) = last {
            row("last training loss", format!("{loss:.4}"));
        }
        let exported = receipt.steps.iter().find(|step| step.step == receipt.adapter_step);
        if let Some(loss) = exported.and_then(|step| step.eval_loss) {
            row("evaluation loss", format!("{loss:.4}"));
        }
        if let Some(export) = receipt.export {
            row(
                "difference of the files from the trained adapter",
                format!(
                    "logits at most {:.1e}, KL {:.1e} nats a token",
                    export.largest_difference, export.kl_divergence
                ),
            );
        }
        row("SHA-256 of the base", format!("`{}`", receipt.base_sha256));
        row("SHA-256 of the training data", format!("`{}`", receipt.train_sha256));
        text
    }
}
