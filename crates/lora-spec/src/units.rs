//! Sizes in binary units.

/// Formats `n` bytes in the largest unit of which it is at least one.
pub fn format_bytes(n: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    UNITS
        .iter()
        .find(|(_, size)| n >= *size)
        .map_or_else(|| format!("{n} B"), |(unit, size)| format!("{:.2} {unit}", n as f64 / *size as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_formatted_in_the_largest_unit() {
        assert_eq!(
            [1023, 1536, 3 << 30].map(format_bytes),
            ["1023 B".to_owned(), "1.50 KiB".into(), "3.00 GiB".into()]
        );
    }
}
