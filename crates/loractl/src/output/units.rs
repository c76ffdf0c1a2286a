//! Text forms of numbers, sizes and times.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use prost_types::Timestamp;

/// Formats a number with its digits in groups of three.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let grouped: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|g| std::str::from_utf8(g).ok()).collect();
    grouped.join(",")
}

/// Parses a number of bytes with or without a unit.
pub(crate) fn parse_bytes(text: &str) -> Result<u64> {
    const UNITS: [(&str, u64); 10] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1000),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let text = text.trim();
    let unit = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
    let (number, unit) = unit.unwrap_or((text, 1));
    match number.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(unit)) {
        Some(size) => Ok(size),
        None => bail!("must be a whole number of bytes, or a number with a unit, such as 500MiB or 2GiB"),
    }
}

/// Formats an age in its largest unit, rounded down.
pub(crate) fn format_age(seconds: f64) -> String {
    // An age is negative if this machine's clock is behind the coordinator's.
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Formats a duration in its two largest units.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Formats a time in RFC 3339, to the second, in UTC; `-` if there is none.
pub(crate) fn format_time(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "-".into(), |time| Timestamp { nanos: 0, ..*time }.to_string())
}

/// Returns the seconds from `time` to now, by this machine's clock.
pub(crate) fn seconds_since(time: &Timestamp) -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    now - time.seconds as f64 - f64::from(time.nanos) * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            ["0", "999", "1,000", "12,345,678"],
            [0, 999, 1000, 12_345_678].map(count).each_ref().map(|s| s.as_str())
        );
    }

    #[test]
    fn ages_are_rounded_down_to_one_unit() {
        let minute = 60.0;
        let hour = 60.0 * minute;
        for (seconds, text) in [
            (-5.0, "0 s"),
            (59.9, "59 s"),
            (3.5 * minute, "3 min"),
            (59.99 * minute, "59 min"),
            (1.5 * hour, "1 h"),
            (47.9 * hour, "47 h"),
            (48.0 * hour, "2 d"),
        ] {
            assert_eq!(format_age(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn durations_have_two_units() {
        for (seconds, text) in [
            (12.4, "12 s"),
            (59.6, "1 min 00 s"),
            (250.0, "4 min 10 s"),
            (3900.0, "1 h 05 min"),
            (90_000.0, "1 d 01 h"),
        ] {
            assert_eq!(duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn times_are_rfc_3339_in_utc() {
        let time = Timestamp { seconds: 1_614_729_600, nanos: 5 };
        assert_eq!(format_time(Some(&time)), "2021-03-03T00:00:00Z");
        assert_eq!(format_time(None), "-");
    }

    #[test]
    fn sizes_may_have_units() {
        for (text, bytes) in
            [("0", 0), ("123", 123), ("2GiB", 2 << 30), ("1 MiB", 1 << 20), ("3kB", 3000), ("5 B", 5)]
        {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "GiB", "-1", "1.5GiB", "2 gigs", "99999999TiB"] {
            assert!(parse_bytes(text).unwrap_err().to_string().contains("500MiB"), "{text}");
        }
    }
}
