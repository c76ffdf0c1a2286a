//! The example: its training rows and its held-out rows are disjoint.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};

use flate2::read::GzDecoder;
use lora_e2e::Fixture;
use lora_spec::{JobFile, ModelConfig};
use serde_json::Value;

/// A question and its answer, in lower case and with normalized white space.
type QuestionAnswer = (String, String);

#[test]
fn held_out_training_and_pretraining_rows_are_disjoint() {
    let (train, held_out) = (rows("train.jsonl"), rows("eval.jsonl"));
    assert!(train.len() >= 1000 && held_out.len() >= 100, "{} {}", train.len(), held_out.len());
    let questions =
        |rows: &[QuestionAnswer]| rows.iter().map(|(question, _)| question.clone()).collect::<HashSet<_>>();
    let (trained, asked) = (questions(&train), questions(&held_out));
    assert_eq!(trained.len(), train.len(), "every training question occurs once");
    assert_eq!(asked.len(), held_out.len(), "every held-out question occurs once");
    assert_eq!(trained.intersection(&asked).collect::<Vec<_>>(), Vec::<&String>::new());

    let documents = pretraining();
    assert!(documents.len() >= 10_000, "{}", documents.len());
    let mut turns = 0;
    for message in documents.iter().filter_map(|document| document["messages"].as_array()).flatten() {
        if message["role"] == "user" {
            turns += 1;
            let turn = normalized(message["content"].as_str().unwrap());
            assert!(!trained.contains(&turn) && !asked.contains(&turn), "{turn}");
        }
    }
    assert!(turns >= 1000, "{turns}");
}

#[test]
fn held_out_dates_and_durations_do_not_occur_in_training_rows() {
    let day = |(_, answer): &QuestionAnswer| {
        let is_duration = answer.starts_with('p');
        answer.split('t').next().filter(|_| !is_duration).unwrap_or(answer).to_owned()
    };
    let trained: HashSet<String> = rows("train.jsonl").iter().map(day).collect();
    let asked: HashSet<String> = rows("eval.jsonl").iter().map(day).collect();
    assert_eq!(trained.intersection(&asked).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn pretraining_texts_contain_no_question_with_its_answer() {
    let rows: Vec<QuestionAnswer> = rows("train.jsonl").into_iter().chain(rows("eval.jsonl")).collect();
    let mut questions: HashMap<&str, Vec<&str>> = HashMap::new();
    for (question, answer) in &rows {
        assert!(answer.chars().all(in_answer), "{answer} is one word");
        questions.entry(answer).or_default().push(question);
    }
    for document in pretraining() {
        let turns = document["messages"].as_array().into_iter().flatten();
        let parts: Vec<&str> =
            turns.map(|turn| &turn["content"]).chain([&document["text"]]).filter_map(Value::as_str).collect();
        assert!(!parts.is_empty(), "{document}");
        let text = normalized(&parts.join(" "));
        for word in text.split(|c| !in_answer(c)) {
            let answer = word.trim_matches([':', '-']);
            // `word` is a slice of `text`.
            let before = &text[..word.as_ptr().addr() - text.as_ptr().addr()];
            let asked =
                questions.get(answer).into_iter().flatten().find(|question| before.contains(**question));
            assert_eq!(asked, None, "answered in {text}");
        }
    }
}

#[test]
fn the_example_job_is_valid_and_its_base_small() {
    let job = JobFile::read(&Fixture::example().join("job.yaml")).unwrap().job;
    let parameters = ModelConfig::read(&job.model.base.as_path().into()).unwrap().parameters();
    assert!((1_000_000..=3_000_000).contains(&parameters), "{parameters}");
    for file in job.data.train.iter().chain(&job.data.eval) {
        assert!(file.is_file(), "{}", file.display());
    }
}

/// Whether a character can be part of an ISO 8601 answer.
fn in_answer(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == ':'
}

fn normalized(text: &str) -> String {
    text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn rows(name: &str) -> Vec<QuestionAnswer> {
    let text = fs::read_to_string(Fixture::example().join(name)).unwrap();
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let turns = row["messages"].as_array().unwrap();
        let roles: Vec<&Value> = turns.iter().map(|turn| &turn["role"]).collect();
        assert_eq!(roles, ["user", "assistant"], "{line}");
        let content = |i: usize| normalized(turns[i]["content"].as_str().unwrap());
        (content(0), content(1))
    };
    text.lines().map(row).collect()
}

fn pretraining() -> Vec<Value> {
    let file = File::open(Fixture::example().join("pretrain.jsonl.gz")).unwrap();
    let lines = BufReader::new(GzDecoder::new(file)).lines();
    lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
}
