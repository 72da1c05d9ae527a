//! Attention of one token per row, against the formula in double precision.

use rustbpe::cpu_kernels::attend::Attention;
use rustbpe::cpu_kernels::vector::Isa;
use rustbpe::cpu_kernels::work_queue::Job;

mod numbers;
use numbers::numbers;

struct Case {
    groups: usize,
    heads: usize,
    dim: usize,
    old: usize,
    new: usize,
    /// Where in the old arrays each row has its tokens; negative: nowhere.
    places: Vec<i32>,
    start: Vec<i32>,
    filled: usize,
    window: i32,
}

fn in_order(rows: usize) -> Vec<i32> {
    (0..rows as i32).collect()
}

impl Case {
    fn n(&self) -> usize {
        self.start.len() * self.groups
    }

    /// Rows of the old arrays, all groups counted.
    fn n_old(&self) -> usize {
        (self.places.iter().max().unwrap() + 1).max(1) as usize * self.groups
    }

    /// q, old keys, old values, new keys, new values
    fn arrays(&self) -> [Vec<f32>; 5] {
        let (n, old) = (self.n(), self.n_old() * self.old);
        let sizes = [n * self.heads, old, old, n * self.new, n * self.new];
        std::array::from_fn(|i| numbers(sizes[i] * self.dim, i as u32 + 1))
    }

    fn compute(&self, isa: Isa, arrays: &[Vec<f32>; 5], threads: usize) -> Vec<f32> {
        let mut y = vec![f32::NAN; self.n() * self.heads * self.dim];
        let [q, old_keys, old_values, new_keys, new_values] = arrays.each_ref().map(|array| array.as_ptr());
        let sizes = (self.n(), self.heads, self.dim, self.n_old(), self.old, self.new);
        let rows = (self.places.clone(), self.start.clone());
        // SAFETY: the lengths are right and outlive `wait`; only available instructions are asked for.
        let job = unsafe {
            let arrays = (q, old_keys, old_values, new_keys, new_values, y.as_mut_ptr());
            Attention::new(isa, arrays, sizes, rows, self.filled as i32, self.window, threads).unwrap()
        };
        std::thread::scope(|scope| {
            for _ in 1..job.threads() {
                scope.spawn(|| job.work());
            }
            job.work();
            job.wait();
        });
        y
    }

    fn exact(
        &self,
        [q, old_keys, old_values, new_keys, new_values]: &[Vec<f32>; 5],
        problem: usize,
        head: usize,
    ) -> Vec<f64> {
        let place = self.places[problem / self.groups];
        let start = if place < 0 { 0 } else { self.start[problem / self.groups] as usize };
        let old_problem = place.max(0) as usize * self.groups + problem % self.groups;
        let position = start + self.filled;
        let first = if self.window < 0 { 0 } else { position.saturating_sub(self.window as usize) };
        let token = |old: &[f32], new: &[f32], p: usize| -> Vec<f64> {
            let (array, row) =
                if p < start { (old, old_problem * self.old + p) } else { (new, problem * self.new + p - start) };
            array[row * self.dim..][..self.dim].iter().map(|&x| x as f64).collect()
        };
        let q = &q[(problem * self.heads + head) * self.dim..][..self.dim];
        let scores: Vec<f64> = (first..=position)
            .map(|p| token(old_keys, new_keys, p).iter().zip(q).map(|(k, &q)| k * q as f64).sum::<f64>())
            .map(|dot| dot / (self.dim as f64).sqrt())
            .collect();
        let most = scores.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
        let mut y = vec![0.0; self.dim];
        for (p, s) in (first..=position).zip(&scores) {
            for (y, v) in y.iter_mut().zip(token(old_values, new_values, p)) {
                *y += (s - most).exp() / total * v;
            }
        }
        y
    }
}

fn isas() -> impl Iterator<Item = Isa> {
    [Isa::Avx512, Isa::Avx2].into_iter().filter(|isa| isa.available())
}

#[test]
fn it_is_attention_for_every_shape() {
    for (groups, heads, dim) in [(1, 1, 1), (2, 1, 128), (1, 4, 64), (2, 3, 24), (1, 2, 200), (3, 1, 17), (1, 1, 256)] {
        for (old, new, places, start, filled) in [
            (64, 8, in_order(3), vec![0, 5, 64], 3),
            (0, 4, in_order(2), vec![0, 0], 0),
            (300, 1, in_order(3), vec![299, 1, 130], 0),
            (64, 8, vec![5, 0, -1, 3], vec![40, 7, 30, 64], 3),
            (64, 8, vec![-1], vec![64], 0),
        ] {
            for window in [-1, 0, 2, 7, 128, 1000] {
                let (places, start) = (places.clone(), start.clone());
                let case = Case { groups, heads, dim, old, new, places, start, filled, window };
                let arrays = case.arrays();
                for isa in isas() {
                    let y = case.compute(isa, &arrays, 3);
                    for (i, y) in y.chunks(dim).enumerate() {
                        for (y, exact) in y.iter().zip(case.exact(&arrays, i / heads, i % heads)) {
                            let error = (*y as f64 - exact).abs();
                            assert!(error < 2e-6, "{isa:?} {groups} {heads} {dim} {old} {window}: {error}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let (places, start) = (vec![0], vec![16]);
    let case = Case { groups: 1, heads: 1, dim: 32, old: 16, new: 2, places, start, filled: 0, window: -1 };
    let mut arrays = case.arrays();
    arrays[0].iter_mut().for_each(|q| *q *= 1e4);
    for isa in isas() {
        assert!(case.compute(isa, &arrays, 1).iter().all(|y| y.is_finite() && y.abs() <= 1.0));
    }
}

#[test]
fn a_row_depends_neither_on_its_company_nor_on_the_threads() {
    let case = |start: Vec<i32>| {
        let places = in_order(start.len());
        Case { groups: 2, heads: 2, dim: 64, old: 500, new: 8, places, start, filled: 5, window: -1 }
    };
    for isa in isas() {
        let all = case(vec![500, 3, 77, 250]);
        let arrays = all.arrays();
        let together = all.compute(isa, &arrays, 4);
        assert_eq!(together, all.compute(isa, &arrays, 1));
        for row in 0..4 {
            let alone = case(vec![all.start[row]]);
            let own = arrays.each_ref().map(|array| array[row * array.len() / 4..][..array.len() / 4].to_vec());
            assert_eq!(alone.compute(isa, &own, 1), together[row * together.len() / 4..][..together.len() / 4]);
        }
    }
}

#[test]
fn a_row_said_to_be_longer_than_what_is_in_view_attends_to_that() {
    let case = |start| {
        let (places, start) = (vec![0], vec![start]);
        Case { groups: 1, heads: 1, dim: 16, old: 10, new: 2, places, start, filled: 1, window: -1 }
    };
    for isa in isas() {
        let arrays = case(10).arrays();
        assert_eq!(case(1000).compute(isa, &arrays, 1), case(10).compute(isa, &arrays, 1));
    }
}

#[test]
fn it_does_not_look_beyond_the_arrays() {
    let case =
        Case { groups: 2, heads: 1, dim: 16, old: 10, new: 2, places: vec![0], start: vec![3], filled: 1, window: -1 };
    for isa in isas() {
        let arrays = case.arrays();
        let planned = |place, filled| unsafe {
            let at = arrays.each_ref().map(|array| array.as_ptr());
            let mut y = [0f32; 32];
            let arrays = (at[0], at[1], at[2], at[3], at[4], y.as_mut_ptr());
            Attention::new(isa, arrays, (2, 1, 16, 2, 10, 2), (vec![place], vec![3]), filled, -1, 1).is_some()
        };
        assert!(planned(0, 1) && planned(-1, 1));
        assert!(!planned(0, 2) && !planned(0, -1) && !planned(1, 1));
    }
}
