/// Numbers between -1 and 1 that repeat late (a linear congruential generator).
pub fn numbers(count: usize, mut state: u32) -> Vec<f32> {
    let mut draw = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| draw()).collect()
}
