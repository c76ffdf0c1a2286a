//! A job that survives random faults: kills, terminations and suspensions of workers and of the
//! coordinator, and pauses. It ends with the files of an undisturbed run.
//!
//! The seed is printed. From the environment: `CHAOS_SEED`, `CHAOS_FAULTS` (20) and `CHAOS_STEPS`
//! (300), for longer runs by hand.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::time::Duration;

use lora_e2e::{Fixture, Signal, TestService, Worker, until};
use lora_spec::Philox;

const WORKERS: usize = 3;
/// The longest suspension of a process. It is longer than a lease.
const LONGEST_SUSPENSION_MS: u64 = 4500;
const LONGEST_PAUSE_BETWEEN_FAULTS_MS: u64 = 1500;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

/// Random numbers in a fixed order.
struct Dice {
    philox: Philox,
    drawn: u32,
}

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        self.philox.below(bound, [self.drawn, 0, 0, 0])
    }

    fn milliseconds(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(most))
    }
}

struct Chaos {
    service: TestService,
    workers: Vec<Worker>,
    job: String,
    dice: Dice,
}

impl Chaos {
    /// Injects one fault and returns its name.
    fn fault(&mut self) -> String {
        let victim = self.dice.below(WORKERS as u64) as usize;
        let name = format!("w{victim}");
        match self.dice.below(9) {
            0 | 1 => {
                self.workers.remove(victim).kill();
                self.workers.insert(victim, self.service.worker(&name));
                format!("kill {name}")
            }
            2 => {
                self.workers.remove(victim).daemon.terminate().expect_code(0);
                self.workers.insert(victim, self.service.worker(&name));
                format!("terminate {name}")
            }
            3 | 4 => {
                let time = self.dice.milliseconds(LONGEST_SUSPENSION_MS);
                self.workers[victim].daemon.signal(Signal::STOP);
                std::thread::sleep(time);
                self.workers[victim].daemon.signal(Signal::CONT);
                format!("suspend {name} for {time:?}")
            }
            5 => {
                self.service.kill();
                self.service.restart();
                "kill the coordinator".to_owned()
            }
            6 => {
                self.service.terminate().expect_code(0);
                self.service.restart();
                "terminate the coordinator".to_owned()
            }
            7 => {
                let time = self.dice.milliseconds(LONGEST_SUSPENSION_MS);
                self.service.daemon().signal(Signal::STOP);
                std::thread::sleep(time);
                self.service.daemon().signal(Signal::CONT);
                format!("suspend the coordinator for {time:?}")
            }
            _ => {
                self.service.run(&["pause", &self.job]);
                // A job that is paused during its last step succeeds.
                until("the pause", || {
                    let job = self.service.api().job(&self.job)?;
                    ["paused", "succeeded"].contains(&job.state.as_str()).then_some(())
                });
                self.service.run(&["resume", &self.job]);
                "pause and resume".to_owned()
            }
        }
    }

    fn has_succeeded(&self) -> bool {
        until("the coordinator", || self.service.api().job(&self.job)).state == "succeeded"
    }
}

#[test]
fn random_faults_change_no_bit() {
    let seed = setting("CHAOS_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    let (faults, steps) = (setting("CHAOS_FAULTS").unwrap_or(20), setting("CHAOS_STEPS").unwrap_or(300));
    println!("CHAOS_SEED={seed}");
    let fixture = Fixture::with_short_steps();
    fixture.edit("job.yaml", "max_steps: 48", &format!("max_steps: {steps}"));
    fixture.edit("job.yaml", "save_steps: 8", "save_steps: 50");
    let expected = fixture.finish("expected", &["--threads", "1"]);
    fixture.ask_for_workers(1, WORKERS);

    let service = TestService::start();
    let workers = (0..WORKERS).map(|number| service.worker(&format!("w{number}"))).collect();
    let job = service.submit(&fixture);
    service.until_step(&job, 1);
    let dice = Dice { philox: Philox::new(seed, "chaos"), drawn: 0 };
    let mut chaos = Chaos { service, workers, job, dice };
    let mut injected = 0;
    while injected < faults && !chaos.has_succeeded() {
        let fault = chaos.fault();
        injected += 1;
        let job = until("the coordinator", || chaos.service.api().job(&chaos.job));
        println!("{injected}: {fault}; the job is {} after step {}", job.state, job.completed_steps);
        std::thread::sleep(chaos.dice.milliseconds(LONGEST_PAUSE_BETWEEN_FAULTS_MS));
    }
    let result = chaos.service.result(&chaos.job, &fixture.path("out"));
    assert_eq!(result.adapter_sha256, expected.adapter_sha256, "CHAOS_SEED={seed}");
    assert_eq!((result.receipt, result.metrics), (expected.receipt, expected.metrics), "CHAOS_SEED={seed}");
    assert!(injected >= faults / 2, "the job ended after {injected} faults; raise CHAOS_STEPS");
}
