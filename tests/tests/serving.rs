//! The commands `convert` and `push`, which bring an adapter to where it is served.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs;
use std::path::Path;

use lora_e2e::fake_hub::FakeHub;
use lora_e2e::{Finished, Fixture, json, loractl};
use lora_test_kit::golden;
use serde_json::{Value, json};

const TOKEN: &str = "hf_test";

/// The result of a short job, with a base that has a name on the hub.
fn result() -> Fixture {
    let fixture = Fixture::with_steps(1);
    fixture.finish("out", &[]);
    fixture
}

fn push(hub: &FakeHub, dir: &Path, arguments: &[&str]) -> Finished {
    let mut command = loractl();
    command.arg("push").arg(dir).args(["--to", "org/dates-lora", "-o", "json"]).args(arguments);
    Finished::run(command.env("HF_ENDPOINT", &hub.url).env("HF_TOKEN", TOKEN))
}

#[test]
fn convert_writes_a_gguf_file_and_replaces_none() {
    let fixture = result();
    let convert = || {
        let mut command = loractl();
        command
            .arg("convert")
            .arg("--base")
            .arg(fixture.path("base"))
            .arg("--adapter")
            .arg(fixture.path("out"));
        Finished::run(command.args(["--to", "gguf", "-o", "json", "--out"]).arg(fixture.path("dates.gguf")))
    };
    let converted: Value = serde_json::from_str(&convert().expect_code(0).stdout).unwrap();
    let layers = json(&fixture.path("base/config.json"))["num_hidden_layers"].as_u64().unwrap();
    assert_eq!(converted["adapted_modules"], json!(7 * layers));
    let file = fs::read(fixture.path("dates.gguf")).unwrap();
    assert_eq!(&file[..4], b"GGUF");
    assert_eq!(converted["bytes"], json!(file.len()));
    let again = convert().expect_code(1);
    assert!(again.stderr.contains("already exists; name a new file"), "{}", again.stderr);
    assert_eq!(fs::read(fixture.path("dates.gguf")).unwrap(), file);
}

#[test]
fn push_commits_the_adapter_with_a_model_card() {
    let (fixture, hub) = (result(), FakeHub::start(TOKEN));
    let out = fixture.path("out");
    let base = ["--base-model", "org/base"];
    let pushed: Value = serde_json::from_str(&push(&hub, &out, &base).expect_code(0).stdout).unwrap();
    assert_eq!(pushed["created"], json!(true));
    assert_eq!(pushed["commit"], json!(format!("{}/commit/1", hub.url)));
    let state = hub.state();
    assert!(state.repositories["org/dates-lora"], "the repository is private");
    let (target, lines) = &state.commits[0];
    assert_eq!(target, "org/dates-lora/commit/main");
    assert_eq!(lines[0]["value"]["summary"], json!("Upload adapter"));
    let of = |name: &str| lines.iter().find(|line| line["value"]["path"] == json!(name));
    let text = |name: &str| {
        let line = of(name).unwrap_or_else(|| panic!("{name} in {lines:?}"));
        decode(line["value"]["content"].as_str().unwrap())
    };
    // The weights are a large file, with the bytes of the result.
    let weights = of("adapter_model.safetensors").unwrap();
    assert_eq!(weights["key"], json!("lfsFile"));
    let object = &state.objects[weights["value"]["oid"].as_str().unwrap()];
    assert_eq!(*object, fs::read(out.join("adapter_model.safetensors")).unwrap());
    let config: Value = serde_json::from_str(&text("adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], json!("org/base"));
    assert_eq!(config["r"], json!(4));
    assert!(of("tokenizer.json").is_some());
    let card = text("README.md");
    assert!(card.starts_with("---\nbase_model: org/base\nlibrary_name: peft\n"), "{card}");
    assert!(card.contains("| steps | 1 |") && card.contains("--max-lora-rank 16"), "{card}");
    // Nothing of the commit tells where the job ran.
    let everything: String = lines[1..].iter().filter_map(|line| line["value"]["path"].as_str()).collect();
    assert!(!everything.contains("receipt") && !everything.contains("job.yaml"), "{everything}");
    let here = fixture.path("").to_string_lossy().into_owned();
    assert!(!card.contains(&here) && !text("adapter_config.json").contains(&here));

    // Another push sends no large file again, and takes the user's model card, with the base's
    // name. A request that fails is sent again.
    let named =
        json(&out.join("adapter_config.json"))["base_model_name_or_path"].as_str().unwrap().to_owned();
    fs::write(out.join("README.md"), format!("mine, of {named}")).unwrap();
    hub.fail(1);
    let arguments = ["--base-model", "org/base", "--revision", "feat/a"];
    let again: Value = serde_json::from_str(&push(&hub, &out, &arguments).expect_code(0).stdout).unwrap();
    assert_eq!((&again["created"], hub.state().uploads), (&json!(false), 1));
    let (target, lines) = &hub.state().commits[1];
    assert_eq!(target, "org/dates-lora/commit/feat%2Fa");
    let card = lines.iter().find(|line| line["value"]["path"] == json!("README.md")).unwrap();
    assert_eq!(decode(card["value"]["content"].as_str().unwrap()), "mine, of org/base");
}

#[test]
fn push_refuses_what_others_cannot_load_before_it_sends_anything() {
    let (fixture, hub) = (result(), FakeHub::start(TOKEN));
    let out = fixture.path("out");
    let refused = |finished: Finished, message: &str| {
        let stderr = finished.expect_code(1).stderr;
        assert!(stderr.contains(message), "{stderr}");
        assert!(hub.state().repositories.is_empty());
    };
    refused(
        push(&hub, &out, &[]),
        "which others cannot load; name the base on the hub with --base-model org/name",
    );
    let mut command = loractl();
    command.arg("push").arg(&out).args(["--to", "org/x", "--base-model", "org/base"]);
    command.env("HF_ENDPOINT", &hub.url);
    refused(
        Finished::run(command.env_remove("HF_TOKEN").env("HF_HOME", fixture.path("hf"))),
        "HF_TOKEN: is not set",
    );
    refused(
        Finished::run(command.env("HF_TOKEN", "wrong")),
        "401 Unauthorized: Invalid user token.; HF_TOKEN must be a token with write access",
    );
    fixture.append("out/tokenizer.json", " ");
    refused(
        push(&hub, &out, &["--base-model", "org/base"]),
        "tokenizer.json: is not the file that receipt.json",
    );
}

#[test]
fn push_takes_the_token_of_a_login_and_makes_no_repository_in_vain() {
    let (fixture, hub) = (result(), FakeHub::start(TOKEN));
    let push = |arguments: &[&str]| {
        let mut command = loractl();
        command.arg("push").arg(fixture.path("out")).args(["--to", "org/x", "--base-model", "org/base"]);
        command.env("HF_ENDPOINT", &hub.url).env_remove("HF_TOKEN").env("HF_HOME", fixture.path("hf"));
        Finished::run(command.args(arguments))
    };
    fs::create_dir(fixture.path("hf")).unwrap();
    fixture.write("hf/token", &format!("{TOKEN}\n"));
    let new_branch = push(&["--revision", "dev"]).expect_code(1).stderr;
    assert!(new_branch.contains("a new repository has only the branch main"), "{new_branch}");
    assert!(hub.state().repositories.is_empty());
    push(&[]).expect_code(0);
    assert_eq!(hub.state().commits.len(), 1);
}

#[test]
fn push_uploads_nothing_to_a_public_repository_that_should_be_private() {
    let (fixture, hub) = (result(), FakeHub::start(TOKEN));
    hub.make_public();
    let refused = push(&hub, &fixture.path("out"), &["--base-model", "org/base"]).expect_code(1).stderr;
    assert!(refused.contains("was created as a public repository; nothing was uploaded"), "{refused}");
    let state = hub.state();
    assert!(!state.repositories["org/dates-lora"] && state.commits.is_empty() && state.uploads == 0);
}

#[test]
fn the_card_of_a_multimodal_base_loads_its_class() {
    let hub = FakeHub::start(TOKEN);
    let adapter = golden("cases/gemma3-vision/adapter");
    push(&hub, &adapter, &["--base-model", "org/base"]).expect_code(0);
    let (_, lines) = &hub.state().commits[0];
    let card = lines.iter().find(|line| line["value"]["path"] == json!("README.md")).unwrap();
    let card = decode(card["value"]["content"].as_str().unwrap());
    for line in [
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoTokenizer",
        "model = AutoModelForImageTextToText.from_pretrained(\"org/base\")",
        "model = PeftModel.from_pretrained(model, \"org/dates-lora\")",
    ] {
        assert!(card.lines().any(|found| found == line), "{line}: {card}");
    }
}

#[test]
fn generate_refuses_another_base_than_that_of_the_adapter() {
    let fixture = result();
    fixture.copy_base("other");
    let weights = fixture.path("other/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let generate = |base: &str| {
        let mut command = loractl();
        command.arg("generate").arg("--base").arg(fixture.path(base)).args(["--prompt", "a"]);
        Finished::run(command.args(["--max-new-tokens", "1", "--adapter"]).arg(fixture.path("out")))
    };
    generate("base").expect_code(0);
    let error = generate("other").expect_code(1).stderr;
    assert!(error.contains("is not the base of the adapter's job"), "{error}");
}

/// Decodes base64.
fn decode(text: &str) -> String {
    use base64::Engine;
    String::from_utf8(base64::prelude::BASE64_STANDARD.decode(text).unwrap()).unwrap()
}
