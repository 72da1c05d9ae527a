//! Keeping the k largest of each row, against sorting.

use rustbpe::cpu_kernels::top_k::Largest;
use rustbpe::cpu_kernels::work_queue::Job;

mod numbers;
use numbers::numbers;

fn keep(x: &[f32], k: &[i32], threads: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    // SAFETY: both have the length that k and x say, and outlive `wait`.
    let job = unsafe { Largest::new(x.as_ptr(), y.as_mut_ptr(), x.len() / k.len(), k.to_vec(), threads) };
    std::thread::scope(|scope| {
        for _ in 1..job.threads() {
            scope.spawn(|| job.work());
        }
        job.work();
        job.wait();
    });
    y
}

/// The same by sorting: a stable sort leaves equals in the order of their places.
fn sorted(x: &[f32], k: usize) -> Vec<f32> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].partial_cmp(&x[a]).unwrap());
    let mut y = vec![f32::NEG_INFINITY; x.len()];
    for &i in order.iter().take(k) {
        y[i] = x[i];
    }
    y
}

#[test]
fn it_keeps_what_sorting_keeps() {
    for n in [1, 2, 7, 8, 255, 1024, 4096, 20_000] {
        let fine = numbers(n, 1);
        let coarse: Vec<f32> = fine.iter().map(|x| (x * 10.0).round() / 10.0).collect(); // many equals, 0.0 and -0.0
        let mut padded = fine.clone();
        padded[n / 2..].fill(f32::NEG_INFINITY);
        for x in [&fine, &coarse, &padded, &vec![3.0; n]] {
            for k in [0, 1, 2, 5, 50, 64, n / 3, n - 1, n, n + 5] {
                assert_eq!(keep(x, &[k as i32], 1), sorted(x, k), "{n} {k}");
            }
        }
    }
}

#[test]
fn each_row_has_its_own_k_whatever_the_threads() {
    let (rows, n) = (40, 2_000);
    let x = numbers(rows * n, 3);
    let k: Vec<i32> = (0..rows as i32).map(|row| row * 60 - 5).collect();
    let together = keep(&x, &k, 4);
    for (row, &k) in k.iter().enumerate() {
        let own = row * n..(row + 1) * n;
        assert_eq!(together[own.clone()], sorted(&x[own], k.max(0) as usize));
    }
    assert_eq!(together, keep(&x, &k, 1));
}

#[test]
fn what_is_not_a_number_does_no_harm() {
    let mut x = numbers(3_000, 5);
    x[7] = f32::NAN;
    keep(&x, &[50], 1);
    keep(&vec![f32::NAN; 3_000], &[50], 1);
}
