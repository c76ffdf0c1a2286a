//! Checks of packages, targets, features and profiles in commands of cargo.

use std::process::Command;
use std::sync::OnceLock;

use lora_e2e::repository;
use serde_json::Value;

use crate::files;
use crate::markdown::Document;
use crate::shell;

/// Profiles that cargo defines.
const PROFILES: [&str; 4] = ["dev", "release", "test", "bench"];

fn problems(document: &Document) -> Vec<String> {
    let blocks = document.blocks.iter().filter(|block| block.language == "sh");
    let typed =
        blocks.flat_map(|block| shell::commands(&block.text).into_iter().map(|words| (block.line, words)));
    let inline =
        document.code.iter().map(|code| (code.line, code.text.split(' ').map(str::to_owned).collect()));
    let commands = typed.chain(inline).filter(|(_, words): &(usize, Vec<String>)| words[0] == "cargo");
    commands
        .flat_map(|(line, words)| {
            check_command(&words)
                .into_iter()
                .map(move |what| document.problem(line, &format!("{}: {what}", words.join(" "))))
        })
        .collect()
}

fn check_command(words: &[String]) -> Vec<String> {
    let words: Vec<&str> = words.iter().map(String::as_str).take_while(|word| *word != "--").collect();
    let values = |flags: &[&str]| -> Vec<&str> {
        let pairs = words.windows(2).filter(|pair| flags.contains(&pair[0]));
        pairs.map(|pair| pair[1]).collect()
    };
    let mut problems = Vec::new();
    let chosen = values(&["-p", "--package"]);
    for name in &chosen {
        if package(name).is_none() {
            problems.push(format!("package {name} does not exist"));
        }
    }
    let packages: Vec<&Value> = match chosen.is_empty() {
        true => packages().iter().collect(),
        false => chosen.iter().filter_map(|name| package(name)).collect(),
    };
    for (flag, kind) in [("--test", "test"), ("--bin", "bin"), ("--example", "example")] {
        let targets = || packages.iter().flat_map(|package| package["targets"].as_array().unwrap());
        for name in values(&[flag]) {
            if !targets().any(|target| target["name"] == name && target["kind"][0] == kind) {
                problems.push(format!("{kind} {name} does not exist"));
            }
        }
    }
    for feature in values(&["--features"]).iter().flat_map(|list| list.split(',')) {
        let has = |package: &Value, feature: &str| package["features"].get(feature).is_some();
        let exists = match feature.split_once('/') {
            Some((name, feature)) => package(name).is_some_and(|package| has(package, feature)),
            None => packages.iter().any(|package| has(package, feature)),
        };
        if !exists {
            problems.push(format!("feature {feature} does not exist"));
        }
    }
    for profile in values(&["--profile"]) {
        let own = format!("\n[profile.{profile}]\n");
        if !PROFILES.contains(&profile) && !files::text("Cargo.toml").contains(&own) {
            problems.push(format!("profile {profile} does not exist"));
        }
    }
    problems
}

fn package(name: &str) -> Option<&'static Value> {
    packages().iter().find(|package| package["name"] == name)
}

/// The packages of the workspace.
fn packages() -> &'static [Value] {
    static METADATA: OnceLock<Value> = OnceLock::new();
    let metadata = METADATA.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let arguments = ["metadata", "--no-deps", "--offline", "--format-version", "1"];
        let output = Command::new(cargo).current_dir(repository()).args(arguments).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    });
    metadata["packages"].as_array().unwrap()
}

#[test]
fn every_package_target_and_feature_exists() {
    crate::expect_none(Document::all().iter().flat_map(problems));
}

#[test]
fn names_that_do_not_exist_are_found() {
    for (text, expected) in [
        ("```sh\ncargo test -p lora-speck\n```", "package lora-speck does not exist"),
        ("```sh\ncargo test -p lora-e2e --test nothing\n```", "test nothing does not exist"),
        ("```sh\ncargo test -p lora-spec --test same_bits\n```", "test same_bits does not exist"),
        ("```sh\ncargo build -p lora-worker --features cudo\n```", "feature cudo does not exist"),
        ("```sh\ncargo build --features lora-worker/cudo\n```", "feature lora-worker/cudo does not exist"),
        ("```sh\ncargo build --profile kitt\n```", "profile kitt does not exist"),
        ("`cargo run --example nothing -- --example x`", "example nothing does not exist"),
    ] {
        crate::expect_problem(problems, text, expected);
    }
    crate::expect_sound(
        problems,
        "```sh\ncargo build --profile kit -p lora-gpu --features lora-worker/cuda,cuda\n```",
    );
}
